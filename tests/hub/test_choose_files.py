"""Which files are fetched, from names alone."""

from __future__ import annotations

import json

import pytest

from sllmctl.core.hub.files import choose_files
from sllmctl.errors import HubError


def choose(*names, indexes=None, **patterns):
    indexes = indexes or {}

    def read_index(name):
        return json.dumps(
            {"weight_map": {f"t{i}": f for i, f in enumerate(indexes[name])}}
        ).encode()

    return choose_files(names, read_index=read_index, **patterns)


def test_safetensors_leave_every_other_weight_format_out():
    chosen = choose(
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "flax_model.msgpack.index.json",
        "rust_model.ot",
        "tiny-q4.gguf",
        "model.onnx",
        "onnx/config.json",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "metal/model.bin",
        "checkpoint-500/model.safetensors",
        "tokenizer.json",
    )
    assert chosen == ["config.json", "model.safetensors", "tokenizer.json"]


def test_subfolders_and_small_files_are_kept():
    names = ("1_Pooling/config.json", "2_Dense/model.safetensors", "LICENSE", "model.safetensors")
    assert choose(*names) == sorted(names)


def test_pickled_weights_are_taken_where_there_are_no_safetensors():
    chosen = choose(
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "rng_state_0.pth",
        "consolidated.00.pth",
        "config.json",
    )
    assert chosen == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("weights", ["weights.pt", "model.pth", "adapter.bin"])
def test_pickled_weights_of_any_name_are_taken(weights):
    assert choose("config.json", weights) == sorted(["config.json", weights])


def test_pickled_weights_win_over_safetensors_in_a_subfolder_only():
    assert "pytorch_model.bin" in choose("pytorch_model.bin", "extra/model.safetensors")


def test_an_index_decides_between_safetensors_sets():
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    chosen = choose(
        *shards, "consolidated.safetensors", "old.safetensors", index, indexes={index: shards}
    )
    assert chosen == sorted([*shards, index])


def test_the_standard_index_goes_before_a_variant():
    index, variant = "model.safetensors.index.json", "model.fp16.safetensors.index.json"
    chosen = choose(
        *("a.safetensors", "a.fp16.safetensors", index, variant),
        indexes={index: ["a.safetensors"], variant: ["a.fp16.safetensors"]},
    )
    assert chosen == sorted(["a.safetensors", index, variant])


def test_an_index_of_pickled_shards_decides_too():
    index = "pytorch_model.bin.index.json"
    shards = ["pytorch_model-00001-of-00001.bin"]
    assert choose(*shards, "stray.bin", index, indexes={index: shards}) == sorted([*shards, index])


def test_consolidated_weights_are_left_out_without_an_index():
    assert choose("model.safetensors", "consolidated.safetensors") == ["model.safetensors"]


def test_consolidated_weights_are_taken_when_they_are_all_there_is():
    assert choose("consolidated.safetensors") == ["consolidated.safetensors"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}'])
def test_a_damaged_index_leaves_the_choice_open(content):
    names = ["model-1.safetensors", "model.safetensors.index.json"]
    assert choose_files(names, read_index=lambda _: content) == names


def test_patterns_narrow_weights_and_extra_files_alike():
    names = ("config.json", "model.safetensors", "pytorch_model.bin", "docs/a.md", "docs/b.md")
    assert choose(*names, include=["*.json", "docs/*"]) == ["config.json", "docs/a.md", "docs/b.md"]
    assert choose(*names, exclude=["docs/*", "*.safetensors"]) == [
        "config.json",
        "pytorch_model.bin",
    ]
    assert choose(*names, include=["nothing"]) == []


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil", "a//b", "a/./b", "a\\..\\b", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused(name):
    with pytest.raises(HubError, match="unsafe name"):
        choose("config.json", name)

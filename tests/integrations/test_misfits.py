"""Weights that do not fit the model are refused by name; nothing is made up for them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sllmctl
from sllmctl.errors import CheckpointError
from sllmctl.transformers import load_model
from tests.integrations.compare import V5
from tests.models import AUTO_CLASS, same_bits

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def edited(tmp_path: Path, original: Any) -> Callable[[str, Callable[[Tensors], object]], Path]:
    """Write a model again with other tensors."""

    def edit(name: str, change: Callable[[Tensors], object]) -> Path:
        path = tmp_path / name
        ignored = shutil.ignore_patterns("*.safetensors*")
        shutil.copytree(original(name), path, ignore=ignored)
        tensors = sllmctl.load_tensors(original(name))
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path

    return edit


def refusal(path: Path, name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(path, hf_model_class=AUTO_CLASS[name])
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qwen3", "lm_head.weight"),
        ("qwen3-tied", "model.embed_tokens.weight"),
        ("llama", "model.layers.1.self_attn.q_proj.weight"),
        ("opt", "model.decoder.layers.0.fc1.bias"),
        ("qwen3-moe", "model.layers.0.mlp.gate.weight"),
        ("t5", "shared.weight"),
        ("bart", "model.encoder.layernorm_embedding.weight"),
        ("bert", "pooler.dense.bias"),
    ],
)
def test_a_missing_weight_is_named(name: str, tensor: str, edited: Any) -> None:
    message = refusal(edited(name, lambda tensors: tensors.pop(tensor)), name)
    assert " missing: " in message
    assert f"`{tensor}`" in message


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "t5", "bert"])
def test_an_unexpected_weight_is_named(name: str, edited: Any) -> None:
    extra = {"model.layers.7.surprise.weight": torch.zeros(3)}
    message = refusal(edited(name, lambda tensors: tensors.update(extra)), name)
    assert "unexpected: `model.layers.7.surprise.weight`" in message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("qwen3", "model.norm.weight"), ("t5", "shared.weight"), ("bert", "pooler.dense.weight")],
)
def test_a_weight_of_another_shape_is_named(name: str, tensor: str, edited: Any) -> None:
    message = refusal(edited(name, lambda ts: ts.update({tensor: torch.zeros(5, 5)})), name)
    assert f"of another shape: `{tensor}`" in message
    if V5:
        assert "[5, 5] instead of" in message


def test_many_names_are_counted(edited: Any) -> None:
    def keep_norms(tensors: Tensors) -> None:
        for name in [name for name in tensors if "norm" not in name]:
            del tensors[name]

    message = refusal(edited("qwen3", keep_norms), "qwen3")
    assert "and 11 more" in message


@pytest.mark.skipif(not V5, reason="transformers 4.x keeps experts apart")
def test_one_missing_expert_is_noticed(edited: Any) -> None:
    expert = "model.layers.0.mlp.experts.2.down_proj.weight"
    message = refusal(edited("qwen3-moe", lambda tensors: tensors.pop(expert)), "qwen3-moe")
    assert (
        "`model.layers.0.mlp.experts.down_proj` is [3, 128, 64] instead of [4, 128, 64]" in message
    )


@pytest.mark.skipif(not V5, reason="transformers 4.x keeps experts apart")
def test_one_misshapen_expert_is_noticed(edited: Any) -> None:
    wrong = {"model.layers.0.mlp.experts.2.down_proj.weight": torch.zeros(5, 5)}
    message = refusal(edited("qwen3-moe", lambda tensors: tensors.update(wrong)), "qwen3-moe")
    assert "not convertible: `model.layers.0.mlp.experts.down_proj`" in message


def test_names_that_a_class_ignores_are_no_misfit(edited: Any, original: Any) -> None:
    old = {"embeddings.position_ids": torch.arange(128).unsqueeze(0)}
    path = edited("bert", lambda tensors: tensors.update(old))
    model = load_model(path, hf_model_class="AutoModel")
    expected = load_model(original("bert"), hf_model_class="AutoModel")
    assert all(map(same_bits, model.parameters(), expected.parameters()))
    assert all(map(same_bits, model.buffers(), expected.buffers()))


def test_another_class_than_the_saved_one_is_pointed_at(original: Any) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected: `lm_head\.weight`") as caught:
        load_model(original("qwen3"), hf_model_class="AutoModel")
    assert "Qwen3ForCausalLM" in str(caught.value.hint)


def test_the_refusal_is_all_that_is_said(
    edited: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING)
    path = edited("qwen3", lambda tensors: tensors.pop("lm_head.weight"))
    refusal(path, "qwen3")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")

"""A saved model is a converted checkpoint with the names and bits that `save_pretrained` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import sllmctl
from sllmctl.errors import ConfigError
from sllmctl.transformers import load_model, save_model
from tests.integrations.compare import different
from tests.models import AUTO_CLASS, MODEL_NAMES, make_model, same_bits

Tensors = dict[str, torch.Tensor]


def auto(name: str) -> Any:
    return getattr(transformers, AUTO_CLASS[name])


def read_plainly(path: Path) -> Tensors:
    return {k: t for file in path.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.fixture
def qwen3(original: Any) -> Any:
    """A model that transformers loaded."""
    return auto("qwen3").from_pretrained(original("qwen3"))


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("loader", ["ours", "theirs", "none"])
def test_what_is_saved_is_what_save_pretrained_saves(
    name: str, loader: str, original: Any, tmp_path: Path
) -> None:
    if loader == "ours":
        model = load_model(original(name), hf_model_class=auto(name))
    else:
        model = auto(name).from_pretrained(original(name))
    if loader == "none":  # built from scratch: it knows nothing of a file's layout
        fresh = type(model)(model.config)
        fresh.load_state_dict(model.state_dict())
        model = fresh.to(model.dtype).eval()
    assert save_model(model, tmp_path / "ours") == tmp_path / "ours"
    model.save_pretrained(tmp_path / "theirs")
    theirs = read_plainly(tmp_path / "theirs")
    assert different(read_plainly(tmp_path / "ours"), theirs) == set()
    assert different(sllmctl.load_tensors(tmp_path / "ours", verify=True), theirs) == set()
    for file in ("config.json", "generation_config.json"):
        mine, other = tmp_path / "ours" / file, tmp_path / "theirs" / file
        assert mine.exists() == other.exists()
        assert not mine.exists() or json.loads(mine.read_text()) == json.loads(other.read_text())


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_saved_model_comes_back(name: str, original: Any, tmp_path: Path) -> None:
    model = auto(name).from_pretrained(original(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    save_model(model, tmp_path / "saved")
    expected = model.state_dict()
    for again in (
        load_model(tmp_path / "saved", hf_model_class=auto(name)),
        auto(name).from_pretrained(tmp_path / "saved"),
    ):
        assert different(again.state_dict(), expected) == set()


def test_the_callers_model_stays_as_it_is(qwen3: Any, tmp_path: Path) -> None:
    qwen3.train()
    before = {n: (t, t.data_ptr(), t._version, t.device) for n, t in qwen3.named_parameters()}
    save_model(qwen3, tmp_path / "saved")
    assert qwen3.training
    for n, t in qwen3.named_parameters():
        assert (t, t.data_ptr(), t._version, t.device) == (before[n][0], *before[n][1:])


def test_views_are_saved_from_their_own_bytes(qwen3: Any, tmp_path: Path) -> None:
    block = torch.randn(1000, 512).to(torch.bfloat16)
    attention = qwen3.model.layers[0].self_attn
    views = {
        "q_proj": block[100:228, 128:256],  # offset and strides
        "k_proj": block[300:428, :64].t(),  # transposed
        "v_proj": block[7, :128].expand(64, 128),  # one row for all
        "o_proj": block.view(-1)[99 : 99 + 128 * 128].view(128, 128),  # offset alone
    }
    for name, view in views.items():
        getattr(attention, name).weight = torch.nn.Parameter(view)
    save_model(qwen3, tmp_path / "saved")
    saved = read_plainly(tmp_path / "saved")
    for name, view in views.items():
        assert same_bits(saved[f"model.layers.0.self_attn.{name}.weight"], view)


@pytest.mark.parametrize("name", ["qwen3-tied", "t5", "bart", "opt"])
def test_ties_are_stored_once_under_the_name_that_loaders_expect(
    name: str, original: Any, tmp_path: Path
) -> None:
    model = auto(name).from_pretrained(original(name))
    save_model(model, tmp_path / "saved")
    saved = read_plainly(tmp_path / "saved")
    assert saved.keys() == read_plainly(original(name)).keys()
    assert "lm_head.weight" not in saved


def test_a_tie_that_the_configuration_does_not_know_survives(qwen3: Any, tmp_path: Path) -> None:
    qwen3.lm_head.weight = qwen3.model.embed_tokens.weight
    save_model(qwen3, tmp_path / "saved")
    for again in (
        load_model(tmp_path / "saved"),
        auto("qwen3").from_pretrained(tmp_path / "saved"),
    ):
        assert different(again.state_dict(), qwen3.state_dict()) == set()


def test_other_files_of_the_directory_stay(qwen3: Any, converted: Any, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    save_model(qwen3, target)
    (target / "tokenizer.json").write_text("mine")
    (target / "sub").mkdir()
    (target / "sub" / "notes.txt").write_text("too")
    (target / "config.json").write_text("old")
    with torch.no_grad():
        qwen3.lm_head.weight.zero_()
    save_model(qwen3, target)
    assert (target / "tokenizer.json").read_text() == "mine"
    assert (target / "sub" / "notes.txt").read_text() == "too"
    assert json.loads((target / "config.json").read_text())["model_type"] == "qwen3"
    assert not sllmctl.load_tensors(target)["lm_head.weight"].any()
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")] == [
        "saved"
    ]


def test_a_model_loaded_from_a_directory_is_saved_over_it(original: Any, tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_model(auto("qwen3").from_pretrained(original("qwen3")), target)
    model = load_model(target)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, target)
    assert different(read_plainly(target), expected) == set()
    assert different(model.state_dict(), expected) == set()


def test_an_offloaded_model_is_saved_whole(original: Any, tmp_path: Path) -> None:
    places = {"model.layers.1": "disk"} | dict.fromkeys(
        ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu"
    )
    path = original("qwen3")
    model = auto("qwen3").from_pretrained(
        path, device_map=places, offload_folder=tmp_path / "off", torch_dtype=torch.bfloat16
    )
    with pytest.warns(UserWarning, match="offloaded"):
        save_model(model, tmp_path / "saved")
    saved = sllmctl.load_tensors(tmp_path / "saved", verify=True)
    assert different(saved, read_plainly(path)) == set()


def test_only_models_of_transformers_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a Linear is not a transformers model"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_no_checkpoint_is_not_replaced(qwen3: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="not replaced"):
        save_model(qwen3, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_a_tokenizer_may_be_saved_before_its_model(tmp_path: Path) -> None:
    source = make_model("qwen3", tmp_path / "source")
    target = tmp_path / "target"
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)
    tokenizer = (target / "tokenizer.json").read_bytes()
    save_model(load_model(source), target)
    assert (target / "tokenizer.json").read_bytes() == tokenizer
    assert load_model(target).config.model_type == "qwen3"

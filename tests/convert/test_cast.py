"""A cast is torch's own, of the main floating dtype alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.write.convert import convert
from sllmctl.core.write.float32 import kept_in_float32
from sllmctl.errors import ConfigError
from tests.conftest import write_checkpoint
from tests.convert.conftest import assert_same_tensors, files_of

SPECIAL = torch.tensor(
    [0.0, -0.0, 1e-45, 1e-8, 6e-8, 65504.0, 65519.9, 65520.0, 3.4e38, float("inf"), float("nan")]
)
TARGETS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def make(directory: Path, tensors: dict[str, torch.Tensor], config: object = None) -> Path:
    write_checkpoint(directory, {"model.safetensors": tensors})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("before", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_cast_is_bit_equal_to_torchs(
    tmp_path: Path, target: Path, dtype: str, before: torch.dtype
) -> None:
    noise = torch.randn(3_000_001, generator=torch.Generator().manual_seed(1))
    tensors = {
        "noise": (noise * 1000).to(before),
        "special": SPECIAL.to(before),
        "scalar": torch.tensor(1 / 3).to(before),
        "empty": torch.empty(0, 3, dtype=before),
        "matrix": noise[:999].reshape(37, 27).to(before),
    }
    source = make(tmp_path / "source", tensors)
    convert(source, target, dtype=dtype)
    expected = {name: tensor.to(TARGETS[dtype]) for name, tensor in tensors.items()}
    # A NaN has many bit patterns; the cast gives the one that torch gives.
    assert_same_tensors(target, expected)


def test_only_the_main_dtype_is_touched(tmp_path: Path, target: Path) -> None:
    tensors = {
        "main": torch.randn(1000).to(torch.bfloat16),
        "router": torch.randn(10),
        "ids": torch.arange(5),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "double": torch.randn(3).double(),
    }
    convert(make(tmp_path / "source", tensors), target, dtype="float16")
    assert_same_tensors(target, {**tensors, "main": tensors["main"].to(torch.float16)})


def test_overflow_to_infinity_is_counted(tmp_path: Path, target: Path) -> None:
    tensors = {"a": torch.tensor([1e5, 1.0, float("inf"), -1e6]), "b": torch.ones(9)}
    source = make(tmp_path / "source", tensors)
    result = convert(source, target, dtype="float16")
    assert result.warnings == (
        "2 values of 1 tensors are too large for float16 and became infinite, 2 of them in `a`",
    )
    assert convert(source, target, dtype="bfloat16", force=True).warnings == ()


def test_a_cast_to_what_it_is_already_changes_nothing(tmp_path: Path, target: Path) -> None:
    source = make(tmp_path / "source", {"a": torch.ones(3)}, {"torch_dtype": "float32"})
    convert(source, target, dtype="float32")
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_ties_survive_a_cast(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    weight = torch.randn(5)
    torch.save({"embed": weight, "lm_head": weight}, source / "pytorch_model.bin")
    convert(source, target, dtype="bfloat16")
    assert open_checkpoint(target).aliases == {"lm_head": "embed"}
    assert open_checkpoint(target).tensors["embed"].dtype == "BF16"


def test_only_dtype_keys_of_the_configuration_change(tmp_path: Path, target: Path) -> None:
    config = {
        "architectures": ["Unknown"],
        "torch_dtype": "float32",
        "text": {"dtype": "torch.float32", "name": "float32"},
        "vision": {"torch_dtype": "float64"},
        "layers": [{"dtype": "float32"}, {"dtype": None}],
        "title": "é",
    }
    source = make(tmp_path / "source", {"a": torch.ones(3)}, config)
    (source / "sub").mkdir()
    (source / "sub" / "config.json").write_text('{"dtype": "float32"}')
    convert(source, target, dtype="bfloat16")
    assert json.loads((target / "config.json").read_text()) == {
        **config,
        "torch_dtype": "bfloat16",
        "text": {"dtype": "bfloat16", "name": "float32"},
        "layers": [{"dtype": "bfloat16"}, {"dtype": None}],
    }
    assert list(json.loads((target / "config.json").read_text())) == list(config)
    assert (target / "sub" / "config.json").read_text() == '{"dtype": "float32"}'


def test_a_configuration_that_lies_about_the_dtype_is_set_right(
    tmp_path: Path, target: Path
) -> None:
    source = make(tmp_path / "source", {"a": torch.ones(3)}, {"dtype": "float16"})
    convert(source, target, dtype="bfloat16")
    assert json.loads((target / "config.json").read_text()) == {"dtype": "bfloat16"}


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_quantized_checkpoint_is_refused(tmp_path: Path, target: Path, part: str | None) -> None:
    config: dict[str, object] = {"quantization_config": {"quant_method": "fp8"}}
    if part is not None:
        config = {part: config}
    source = make(tmp_path / "source", {"a": torch.ones(3)}, config)
    with pytest.raises(ConfigError, match="is quantized .*cannot be cast to bfloat16"):
        convert(source, target, dtype="bfloat16")
    convert(source, target)
    assert_same_tensors(target, {"a": torch.ones(3)})


def test_a_damaged_configuration_is_named(tmp_path: Path, target: Path) -> None:
    source = make(tmp_path / "source", {"a": torch.ones(3)})
    (source / "config.json").write_text("{")
    with pytest.raises(Exception, match=r"cannot read `.*config.json`"):
        convert(source, target, dtype="bfloat16")
    convert(source, target)
    assert files_of(target)["config.json"] == b"{"


def test_names_that_stay_in_float32_without_a_known_model(tmp_path: Path, target: Path) -> None:
    tensors = {
        f"layers.0.{name}": torch.randn(4)
        for name in ("weight", "rotary_emb.inv_freq", "bn.running_mean", "bn.running_var", "A_log")
    }
    convert(make(tmp_path / "source", tensors, {"architectures": []}), target, dtype="bfloat16")
    found = {name: entry.dtype for name, entry in open_checkpoint(target).tensors.items()}
    assert [name for name, dtype in found.items() if dtype == "BF16"] == ["layers.0.weight"]


def tiny_t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


def test_what_transformers_keeps_in_float32_stays(tmp_path: Path, target: Path) -> None:
    model = tiny_t5()
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", target, dtype="float16")
    kept = {n for n, e in open_checkpoint(target).tensors.items() if e.dtype == "F32"}
    assert kept == {n for n in model.state_dict() if n.endswith(".wo.weight")} != set()
    loaded = T5ForConditionalGeneration.from_pretrained(target)
    for name, tensor in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert torch.equal(tensor, expected if "wo" in name else expected.to(torch.float16))


def test_a_list_for_float16_alone_does_not_bind_bfloat16(tmp_path: Path, target: Path) -> None:
    tiny_t5().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", target, dtype="bfloat16")
    assert {entry.dtype for entry in open_checkpoint(target).tensors.values()} == {"BF16"}


def test_an_ordinary_model_is_cast_as_a_whole(tmp_path: Path, target: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", target, dtype="bfloat16")
    assert_same_tensors(
        target, {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    )
    loaded = LlamaForCausalLM.from_pretrained(target)
    assert loaded.dtype == torch.bfloat16


def test_a_configuration_that_transformers_refuses_falls_back_to_the_class() -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "d_model": "nonsense"}
    keep = kept_in_float32(config, "float16")
    assert keep("decoder.block.0.layer.2.DenseReluDense.wo.weight")
    assert not keep("decoder.block.0.layer.2.DenseReluDense.wi.weight")

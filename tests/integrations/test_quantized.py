"""Quantized checkpoints, and models quantized while they load, as far as transformers goes here."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import sllmctl
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.errors import CheckpointError, ConfigError
from sllmctl.integrations.hf_build import _require_scales, make_skeleton
from sllmctl.integrations.hf_devices import _count_quantized_as_stored, _renaming, _stays_packed
from tests.integrations.compare import (
    V5,
    assert_same_model,
    assert_same_tokens,
    loaded,
    outputs,
    reference,
)
from tests.models import same_bits

Tensors = dict[str, torch.Tensor]
BLOCK = 64
# What these packages say of themselves when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::FutureWarning")

needs_compressed_tensors = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed (make test-models has it)",
)
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="torchao is not installed (make test-models has it)",
)
needs_v5 = pytest.mark.skipif(not V5, reason="transformers 4.x does it with an accelerator alone")


def fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in blocks of 64 × 64 with a scale each, as DeepSeek publishes them."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).reshape(rows, columns)
    return {"": values.to(torch.float8_e4m3fn), "_scale_inv": scale}


def int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in eight bits with a scale a row, as compressed-tensors stores it."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
    values = torch.round(weight.float() / scale).clamp(-127, 127)
    return {"": values.to(torch.int8), "_scale": scale.to(torch.bfloat16)}


FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head"],
}
_EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}


@pytest.fixture
def quantize(tmp_path: Path, original: Any) -> Callable[..., Path]:
    """Write a model again with its projections quantized."""

    def write(
        name: str, kind: Callable[[torch.Tensor], Tensors], settings: dict[str, Any], drop: str = ""
    ) -> Path:
        path = tmp_path / f"{name}-{kind.__name__}"
        shutil.copytree(original(name), path, ignore=shutil.ignore_patterns("*.safetensors*"))
        tensors: Tensors = {}
        for key, weight in sllmctl.load_tensors(original(name)).items():
            parts = kind(weight) if key.endswith("_proj.weight") else {"": weight}
            tensors |= {key + suffix: part for suffix, part in parts.items()}
        tensors.pop(drop, None)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return path

    return write


@needs_v5
@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_fp8_blocks_become_what_transformers_makes_of_them(
    name: str, quantize: Any, original: Any
) -> None:
    path = quantize(name, fp8, FP8)
    model = loaded(path, name)
    assert_same_model(model, reference(path, name))
    assert not same_bits(outputs(model), outputs(loaded(original(name), name)))


@needs_v5
def test_a_missing_scale_is_refused(quantize: Any) -> None:
    gone = "model.layers.1.mlp.up_proj.weight_scale_inv"
    path = quantize("qwen3", fp8, FP8, drop=gone)
    with pytest.raises(CheckpointError, match=f"missing: `{gone}`"):
        loaded(path, "qwen3")


def test_what_stands_beside_a_weight_needs_no_scale() -> None:
    eight = torch.zeros(2, dtype=torch.int8)
    beside = {"a.weight_zero_point": eight, "b.weight_scale": eight.to(torch.float8_e4m3fn)}
    weights = {f"{name}.weight": eight for name in "ab"}
    scales = {f"{name}.weight_scale": torch.zeros(2) for name in "ab"}
    skeleton: Any = SimpleNamespace(
        config=SimpleNamespace(quantization_config={}, architectures=[]),
        model_class=torch.nn.Linear,
        path="model",
    )
    _require_scales(skeleton, weights | scales | beside)
    del scales["a.weight_scale"]
    with pytest.raises(CheckpointError, match=r"missing: `a.weight_scale`$"):
        _require_scales(skeleton, weights | scales | beside)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "gpt2"])
def test_a_device_has_to_hold_what_is_stored_of_a_quantized_weight(
    name: str, quantize: Any, original: Any
) -> None:
    from accelerate.utils import compute_module_sizes

    def packed(weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        packs = torch.zeros(rows, columns // 8, dtype=torch.int32)
        return {"_packed": packs, "_scale": torch.zeros(rows, 2, dtype=torch.bfloat16)}

    def four_bits(weight: torch.Tensor) -> Tensors:  # as bitsandbytes stores them
        packs = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
        scales = torch.zeros(weight.numel() // 64)
        return {"": packs, ".absmax": scales, ".quant_map": torch.zeros(16)}

    for kind in (fp8, packed, four_bits) if name != "gpt2" else (packed, four_bits):
        path = quantize(name, kind, {})
        checkpoint = open_checkpoint(path)
        skeleton = make_skeleton(original(name))
        with torch.device("meta"):
            model = skeleton.model_class(skeleton.config)
        model.tie_weights()
        _count_quantized_as_stored(model, checkpoint, _renaming(model))
        sizes = compute_module_sizes(model, dtype=torch.bfloat16)
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        assert checkpoint.nbytes <= sizes[""] <= checkpoint.nbytes + buffers


@pytest.mark.parametrize(
    ("settings", "packed"),
    [
        (None, False),
        ({"quant_method": "gptq", "bits": 4}, True),
        ({"quant_method": "compressed-tensors", "run_compressed": False}, False),
        ({"quant_method": "compressed-tensors"}, True),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, False),
        (transformers.AwqConfig(bits=4), True),
    ],
)
def test_what_becomes_bfloat16_counts_as_such(settings: Any, packed: bool) -> None:
    assert _stays_packed(SimpleNamespace(quantization_config=settings)) == packed


@needs_compressed_tensors
def test_int8_loads_as_transformers_loads_it(quantize: Any, original: Any, tmp_path: Path) -> None:
    path = quantize("qwen3", int8, INT8)
    model, expected = loaded(path, "qwen3"), reference(path, "qwen3")
    assert model.config.to_dict() == expected.config.to_dict()
    assert_same_model(model, expected)
    assert_same_tokens(model, expected)
    assert not same_bits(outputs(model), outputs(loaded(original("qwen3"), "qwen3")))


@needs_compressed_tensors
@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_a_missing_part_of_an_int8_weight_is_refused(part: str, quantize: Any) -> None:
    path = quantize("qwen3", int8, INT8, drop=f"model.layers.1.mlp.up_proj.{part}")
    with pytest.raises(CheckpointError, match=f"missing: `model.layers.1.mlp.up_proj.{part}`"):
        loaded(path, "qwen3")


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is not None, reason="it is installed"
)
def test_a_quantizer_that_is_not_installed_is_named(quantize: Any) -> None:
    path = quantize("qwen3", int8, INT8)
    with pytest.raises(ConfigError, match="compressed.tensors") as caught:
        loaded(path, "qwen3")
    assert "\n" not in str(caught.value)


@needs_torchao
@needs_v5
def test_a_model_is_quantized_while_it_loads(original: Any, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    settings = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = loaded(original("qwen3"), "qwen3", quantization_config=settings)
    expected = reference(original("qwen3"), "qwen3", quantization_config=settings, device_map="cpu")
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    assert same_bits(outputs(model), outputs(expected))

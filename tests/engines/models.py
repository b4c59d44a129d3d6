"""Tiny checkpoints for engines: those of ``tests.models``, and quantized ones made by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models import make_model

Tensors = dict[str, torch.Tensor]
GROUP = 32


def read_tensors(path: Path) -> Tensors:
    """All tensors of a directory of safetensors files."""
    return {
        name: tensor
        for shard in sorted(path.glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }


def write_like(source: Path, target: Path, tensors: Tensors, **config: Any) -> Path:
    """Another checkpoint with the configuration and the tokenizer of one, as a single file."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if "safetensors" not in path.name and path.name != "sllmctl.json" and path.is_file():
            shutil.copy(path, target)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors")
    document = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(document))
    return target


def bare_like(source: Path, target: Path) -> Path:
    """What an engine needs besides weights: configuration and tokenizer, and nothing else."""
    write_like(source, target, {})
    (target / "model.safetensors").unlink()
    return target


def make_int8(source: Path, target: Path) -> Path:
    """W8A8 in the layout of compressed-tensors: a scale for each output channel."""
    tensors: Tensors = {}
    for name, weight in read_tensors(source).items():
        if name.endswith("_proj.weight"):
            scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
            tensors[name] = torch.round(weight.float() / scale).clamp(-127, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
        else:
            tensors[name] = weight

    def arguments(strategy: str, *, dynamic: bool) -> dict[str, Any]:
        return {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": strategy,
            "dynamic": dynamic,
        }

    group = {
        "targets": ["Linear"],
        "weights": arguments("channel", dynamic=False),
        "input_activations": arguments("token", dynamic=True),
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }
    return write_like(source, target, tensors, quantization_config=quantization)


def _four_bits(
    source: Path, target: Path, shape_of: Callable[[int, int], tuple[int, int]], **config: Any
) -> Path:
    """Random four-bit weights, eight to an int32: what they mean does not matter to a loader."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    tensors: Tensors = {}
    for name, weight in read_tensors(source).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        stem = name.removesuffix("weight")
        rows, columns = weight.shape[1], weight.shape[0]
        groups = rows // GROUP
        tensors[f"{stem}qweight"] = noise(*shape_of(rows, columns))
        tensors[f"{stem}qzeros"] = noise(groups, columns // 8)
        tensors[f"{stem}scales"] = (torch.rand(groups, columns, generator=generator) / 64).to(
            torch.bfloat16
        )
        if config["quant_method"] == "gptq":
            tensors[f"{stem}g_idx"] = (torch.arange(rows) // GROUP).to(torch.int32)
    return write_like(
        source, target, tensors, quantization_config={"group_size": GROUP, "bits": 4, **config}
    )


def make_gptq(source: Path, target: Path) -> Path:
    """Four bits, packed along the rows, in the layout of GPTQ."""
    return _four_bits(
        source,
        target,
        lambda rows, columns: (rows // 8, columns),
        quant_method="gptq",
        desc_act=False,
        sym=True,
    )


def make_awq(source: Path, target: Path) -> Path:
    """Four bits, packed along the columns, in the layout of AWQ."""
    return _four_bits(
        source,
        target,
        lambda rows, columns: (rows, columns // 8),
        quant_method="awq",
        zero_point=True,
        version="gemm",
    )


QUANTIZED = {"qwen3-int8": make_int8, "qwen3-gptq": make_gptq, "qwen3-awq": make_awq}
PLAIN = ("qwen3", "qwen3-tied", "llama", "opt", "qwen3-moe")


def make_source(name: str, path: Path) -> Path:
    """Write one of ``PLAIN`` or ``QUANTIZED``, as one finds them on a hub."""
    if name in PLAIN:
        return make_model(name, path)
    plain = make_model("qwen3", path.parent / f".{name}")
    return QUANTIZED[name](plain, path)

"""Element types: safetensors' codes, their sizes, and torch's names for them.

Source: safetensors 0.8, ``Dtype`` of its Rust library and ``_TYPES`` of ``safetensors.torch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sllmctl.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, for every code that safetensors knows."""

FLOAT_CODES = frozenset({"F16", "BF16", "F32", "F64"})
"""What a cast may start from: plain floating point, not quantized storage."""

CAST_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""What a cast may end in, by the name the command line uses."""

_TORCH_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


CODES = {f"torch.{name}": code for code, name in _TORCH_NAMES.items()}
"""Safetensors codes by what ``str`` makes of a torch dtype."""


def torch_dtype(code: str) -> torch.dtype:
    """Return torch's dtype for a code such as ``BF16``.

    Raises:
        CheckpointError: This torch has no such dtype (``F6_*`` in all, some fp8 in older ones).
    """
    import torch

    name = _TORCH_NAMES.get(code)
    dtype = getattr(torch, name, None) if name is not None else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"torch {torch.__version__} has no dtype for `{code}`",
            hint="a newer torch may have it" if name is not None else None,
        )
    return dtype


def torch_shape(code: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the torch tensor that holds a stored tensor.

    ``F4`` counts single elements in the file, while torch packs two along the last axis.

    Raises:
        CheckpointError: The last axis has an odd number of them.
    """
    if code != "F4":
        return tuple(shape)
    if not shape or (shape[-1] % 2 and 0 not in shape):
        raise CheckpointError(f"torch packs F4 in pairs; the last axis of {list(shape)} is odd")
    return (*shape[:-1], shape[-1] // 2)


def dtype_code(dtype: torch.dtype) -> str:
    """Return the safetensors code of a torch dtype.

    Raises:
        CheckpointError: Safetensors cannot store it (complex128, quantized and bit types).
    """
    code = CODES.get(str(dtype))
    if code is None:
        raise CheckpointError(f"safetensors has no type for {dtype}")
    return code


def stored_shape(code: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that the file states for a torch tensor: ``torch_shape`` backwards."""
    if code != "F4":
        return tuple(shape)
    if not shape:
        raise CheckpointError("a scalar of packed F4 has no shape in safetensors")
    return (*shape[:-1], shape[-1] * 2)

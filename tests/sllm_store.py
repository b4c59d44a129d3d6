"""Directories as sllm-store writes them, byte for byte, and as a reader of its own would read them.

Written from the description of the format alone; nothing of sllmctl is used. What the writer gets
wrong is left to the tests, which damage what this makes.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path

import torch

PARTITION_BYTES = 10 * 2**30
"""A file takes no further record past this size; tests make it smaller."""

LOADABLE = (
    *(torch.float16, torch.float32, torch.float64, torch.bfloat16),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
)
"""What sllm-store's own loader takes."""


def storage_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a whole storage: what the writer stores, wherever the tensor starts in it."""
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


def write_sllm_store(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    partition_bytes: int = PARTITION_BYTES,
    padding: bytes = b"\xa5",
) -> Path:
    """Write tensors as ``save_dict`` does; what its padding holds is undefined, and said here."""
    directory.mkdir(parents=True, exist_ok=True)
    files: list[bytearray] = []
    written: dict[int, int] = {}  # address of a storage: its offset
    position = 0
    index = {}
    for name, tensor in tensors.items():
        data = storage_bytes(tensor)
        address = tensor.untyped_storage().data_ptr()
        if address not in written:
            if not files or len(files[-1]) + len(data) > partition_bytes:
                files.append(bytearray())
            written[address] = position
            record = data + padding * (-len(data) % 8)
            files[-1] += record
            position += len(record)
        index[name] = (
            written[address],
            len(data),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            str(tensor.dtype),
        )
    for number, content in enumerate(files):
        (directory / f"tensor.data_{number}").write_bytes(content)
    (directory / "tensor_index.json").write_text(json.dumps(index))
    return directory


def read_sllm_store(directory: Path) -> dict[str, torch.Tensor]:
    """Read tensors as the loader restores them: by offset in the files one after another."""
    data = bytearray()
    number = 0
    while (directory / f"tensor.data_{number}").exists():
        data += (directory / f"tensor.data_{number}").read_bytes()
        number += 1
    memory = torch.frombuffer(data, dtype=torch.uint8)
    tensors = {}
    for name, line in json.loads((directory / "tensor_index.json").read_text()).items():
        offset, size, shape, stride, dtype_name = line
        dtype = getattr(torch, dtype_name.removeprefix("torch."))
        assert dtype in LOADABLE
        assert offset + size <= len(data)
        record = memory[offset : offset + size].clone().view(dtype)
        tensors[name] = record.as_strided(shape, stride)
    return tensors

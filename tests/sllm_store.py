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


def golden_tensors() -> dict[str, torch.Tensor]:
    """What `tests/data/sllm_store_080` holds, which sllm_store 0.8.0 itself has written.

    They are 4096 bytes with padding: its writer loses the end of any save that fills no page.
    """
    embed = torch.arange(96).reshape(8, 12).to(torch.bfloat16)
    return {
        "embed": embed,
        "head": embed,
        "half": torch.linspace(-1, 1, 7).to(torch.float16),
        "single": torch.linspace(0, 1, 5),
        "transposed": torch.arange(30, dtype=torch.float64).reshape(5, 6).t(),
        "int8": torch.arange(-9, 10, dtype=torch.int8),
        "int16": torch.arange(3, dtype=torch.int16),
        "start": torch.arange(500, dtype=torch.int32)[:10],
        "scalar": torch.tensor(-7),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "bytes": torch.arange(1581, dtype=torch.int64).to(torch.uint8),
    }

"""Checkpoints of any size in any number of tensors: for how the cost of a load grows."""

from __future__ import annotations

import json
import random
from pathlib import Path

_BLOCK_BYTES = 16 * 2**20
_HEADER_ALIGN = 8


def write_plain(path: Path, nbytes: int, tensors: int, *, seed: int = 0) -> Path:
    """Write one file of equal bfloat16 vectors with random bits.

    Args:
        path: Directory to make.
        nbytes: Of all tensors, about.
        tensors: How many.
        seed: Another seed gives other bytes.
    """
    path.mkdir(parents=True)
    values = max(1, nbytes // tensors // 2)
    header = {
        f"model.layers.{i}.weight": {
            "dtype": "BF16",
            "shape": [values],
            "data_offsets": [2 * values * i, 2 * values * (i + 1)],
        }
        for i in range(tensors)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGN)
    left = 2 * values * tensors
    block = memoryview(random.Random(seed).randbytes(min(left, _BLOCK_BYTES)))
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while left:
            left -= file.write(block[:left])
    return path

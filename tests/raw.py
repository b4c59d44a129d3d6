"""Safetensors files put together by hand, right and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """A header's entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header_bytes(header: Any) -> bytes:
    """Header text as safetensors writes it; bytes are taken as they are."""
    if isinstance(header, bytes):
        return header
    return json.dumps(header, separators=(",", ":")).encode()


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a file with any header, and any length stated for it."""
    text = header_bytes(header)
    stated = len(text) if length is None else length
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stated.to_bytes(8, "little") + text + data)
    return path

"""Mutations that know JSON: most random changes of bytes never get past the parser."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 8, 255, 4096, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64)
WORDS = (
    *("dtype", "shape", "data_offsets", "__metadata__", "weight_map", "format", "a", "", "é"),
    *("U8", "F4", "F6_E2M3", "BF16", "F64", "C64", "X", "../x", "/x", "a\0b", "\ud800", "\n"),
    *("torch.int8", "torch.float64", "torch.float4_e2m1fn_x2", "torch.complex128"),
    *("format_version", "digest", "xxh3-128", "shards", "files", "name", "size", "chunks"),
)
PATCHES = (
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\0", b"\xff", b"\n", b"0", b"-"),
    *(b"1e9", b"NaN", b"Infinity", b"null", b"true", b"\\u0000", b"\\ud800", b'"a":', b"[[[["),
    b"9" * 40,
    b"1" * 5000,
    b"[" * 3000,
    '"é":'.encode(),
)


def mutate(data: bytes, rng: random.Random, *, framed: bool) -> bytes:
    """Change an input a little; ``framed`` ones start with the length of a header."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        text, tail = (data[8:], b"") if framed else (data, b"")
        if framed:
            length = min(int.from_bytes(data[:8], "little"), len(data) - 8) if len(data) > 8 else 0
            text, tail = text[:length], text[length:]
        text = _mutate_json(text, rng) if rng.random() < 0.6 else _mutate_bytes(text, rng)
        if framed and rng.random() < 0.2:
            tail = tail[: rng.randrange(len(tail) + 1)] + bytes(rng.choice((0, 1, 8, 16)))
        data = text
        if framed:
            stated = len(text) if rng.random() < 0.95 else rng.choice(NUMBERS) % 2**64
            data = stated.to_bytes(8, "little") + text + tail
    return data


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0 and data:
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + rng.randrange(1, 9) :]
    if kind == 2:
        end = min(len(data), at + rng.randrange(1, 40))
        return data[:end] + data[at:end] + data[end:]
    return data[:at] + rng.choice(PATCHES) + data[at + rng.randrange(2) :]


def _mutate_json(data: bytes, rng: random.Random) -> bytes:
    try:
        document = json.loads(data)
        places: list[tuple[Any, Any]] = []
        _collect(document, places)
        if not places:
            return rng.choice((b"{}", b"[]", b'{"a":1}', b"null"))
        parent, key = rng.choice(places)
        _change(parent, key, rng)
        separators = (",", ":") if rng.random() < 0.7 else (", ", ": ")
        text = json.dumps(document, separators=separators, ensure_ascii=rng.random() < 0.5)
        return text.encode(errors="replace")
    except (ValueError, RecursionError, TypeError, KeyError, IndexError):
        return _mutate_bytes(data, rng)


def _collect(node: Any, places: list[tuple[Any, Any]]) -> None:
    keys: list[Any] = []
    if isinstance(node, dict):
        keys = list(node)
    elif isinstance(node, list):
        keys = list(range(len(node)))
    for key in keys:
        places.append((node, key))
        _collect(node[key], places)


def _change(parent: Any, key: Any, rng: random.Random) -> None:
    value = parent[key]
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(value, int):
        parent[key] = value + rng.choice((-8, -1, 1, 2, 8))
    elif kind == 2 and isinstance(parent, dict):
        parent[rng.choice(WORDS)] = parent.pop(key)
    elif kind == 3 and isinstance(parent, dict):
        parent[rng.choice(WORDS)] = value
    elif kind == 4 and isinstance(value, list):
        value.append(rng.choice((0, 1, 2, *NUMBERS)))
    elif kind == 5:
        parent[key] = rng.choice(WORDS)
    elif kind == 6:
        parent[key] = rng.choice(({}, [], None, True, 1.5, "", [value], {"a": value}))
    else:
        parent[key] = rng.choice(NUMBERS)

"""The header of a safetensors file and the index of a sharded checkpoint, read without trust.

Both parsers are pure functions of bytes: whatever they are given, they return a consistent
value or raise CheckpointError, in time and memory proportional to the input.

Source: https://github.com/huggingface/safetensors, README "Format" and ``tensor.rs``.
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, repeat
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from sllmctl.core.dtypes import DTYPE_BITS
from sllmctl.errors import CheckpointError

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""Safetensors' own limit. Source: ``MAX_HEADER_SIZE`` in its ``tensor.rs``."""

LFS_START = b"version "
LFS_HINT = "it was cloned without Git LFS: run `git lfs pull` in its repository"
MAX_RANK = 64
METADATA_KEY = "__metadata__"
_MAX_DIM = 2**63 - 1
_DENSE_TEXT_BYTES = 2**20


class TensorEntry(NamedTuple):
    """One stored tensor.

    ``dtype`` is a safetensors code; ``shard`` an index into the checkpoint's shards; ``offset``
    counts bytes from the start of the shard's file, ``nbytes`` bytes from there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


def one_line(text: object) -> str:
    """Make foreign text fit into a one-line message: printable, and not long."""
    plain = str(text)
    if len(plain) > 200:
        plain = plain[:197] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain)


def shown(text: object) -> str:
    """Quote a foreign name for a one-line message."""
    return f"`{one_line(text)}`"


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: the name of a file need not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_prefix(prefix: bytes, file_size: int, file: str) -> int:
    """Return the header's length from the first 8 bytes of a file of ``file_size`` bytes.

    Raises:
        CheckpointError: The file is too short for a header, or for the one that it announces.
    """
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(
            f"{shown(file)} is {file_size} bytes long, too short for a safetensors header"
        )
    if prefix == LFS_START:
        raise CheckpointError(f"{shown(file)} is a pointer to a file, not the file", hint=LFS_HINT)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{shown(file)} announces a header of {length} bytes; the limit is {MAX_HEADER_BYTES}",
            hint="the file is damaged, or no safetensors file",
        )
    if length > file_size - PREFIX_BYTES:
        raise CheckpointError(
            f"{shown(file)} announces a header of {length} bytes but is {file_size} bytes long"
        )
    return length


def parse_header(
    raw: bytes, data_bytes: int, file: str, *, shard: int = 0
) -> tuple[list[TensorEntry], dict[str, str]]:
    """Parse the header of one file.

    Args:
        raw: The header's JSON, without the 8 bytes of length before it.
        data_bytes: Size of the data section that follows it.
        file: Names the file in errors.
        shard: What the entries say in ``shard``.

    Returns:
        The tensors in the order of their data, which they cover without a hole, and the text
        metadata.

    Raises:
        CheckpointError: Anything is wrong; the message names file, tensor and numbers.
    """
    with collector_paused():
        scanned = _scan_canonical(raw, data_bytes, shard)
        if scanned is not None:
            return scanned
        refuse_dense(raw, file)
        document = load_json(raw, file)
        metadata = document.pop(METADATA_KEY, None)
        if metadata is not None and not _is_metadata(metadata):
            raise CheckpointError(f"`{METADATA_KEY}` of {shown(file)} is not an object of texts")
        placed = [
            (begin, end, TensorEntry(name, dtype, shape, shard, base + begin, end - begin))
            for base in (PREFIX_BYTES + len(raw),)
            for name, info in document.items()
            for dtype, shape, begin, end in (_parse_entry(name, info, data_bytes, file),)
        ]
        placed.sort(key=itemgetter(0, 1))
        position = 0
        for begin, end, entry in placed:
            if begin != position:
                problem = "overlaps the tensor before it" if begin < position else "leaves a hole"
                raise CheckpointError(
                    f"tensor {shown(entry.name)} of {shown(file)} {problem}: it takes bytes "
                    f"{begin} to {end} of the data, {position} is next"
                )
            position = end
        if position != data_bytes:
            raise CheckpointError(
                f"{shown(file)} has {data_bytes - position} bytes after its last tensor: "
                f"tensors end at {position} of {data_bytes} bytes of data"
            )
        return [entry for _, _, entry in placed], metadata or {}


def parse_index(raw: bytes, file: str) -> dict[str, str]:
    """Parse a ``*.safetensors.index.json``: tensor name to shard file name.

    Raises:
        CheckpointError: No JSON object with a ``weight_map`` of one or more names to relative file
            names that stay beneath the index's directory.
    """
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{shown(file)} is {len(raw)} bytes long; the limit is {MAX_HEADER_BYTES}"
        )
    with collector_paused():
        weight_map = load_json(raw, file).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{shown(file)} has no object `weight_map`")
        if not weight_map:
            raise CheckpointError(f"{shown(file)} maps no tensor to a file")
        if set(map(type, weight_map.values())) - {str}:
            name = next(n for n, value in weight_map.items() if type(value) is not str)
            raise CheckpointError(f"{shown(file)} maps tensor {shown(name)} to no file name")
    for shard_name in set(weight_map.values()):
        path = PurePosixPath(shard_name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in shard_name:
            raise CheckpointError(
                f"{shown(file)} names the shard {shown(shard_name)}, "
                "which is not a file beneath its directory"
            )
    return weight_map


@contextmanager
def collector_paused() -> Iterator[None]:
    """Hold off garbage collection: 100,000 new objects would start some that double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _scan_canonical(
    raw: bytes, data_bytes: int, shard: int
) -> tuple[list[TensorEntry], dict[str, str]] | None:
    """Read a header written the way that safetensors writes it, several times as fast as JSON.

    Compact, keys in order, entries in the order of their data. Accepts a text only if the entries
    found make up all of it and each offset is exactly the running sum of sizes, which leaves no
    room for any inconsistency; everything else is None, and the slow path's to judge.
    """
    try:
        text = raw.decode("utf-8").rstrip(" ")
        metadata: Any = {}
        if text.startswith(_METADATA_START):
            metadata, end = _DECODER.raw_decode(text, len(_METADATA_START))
            _check_surrogates(metadata)
            entries = text[end:]
        elif text.startswith("{"):
            entries = "," + text[1:]
        else:
            return None
    except (ValueError, RecursionError, MemoryError):
        return None
    matches = _ENTRY.findall(entries)
    if not matches or not _is_metadata(metadata):
        return None
    names, kinds, places = zip(*matches, strict=True)
    facts = {kind: _parse_kind(kind) for kind in set(kinds)}
    if None in facts.values():
        return None
    sizes = list(map({k: f[2] for k, f in facts.items() if f}.__getitem__, kinds))
    ends = list(accumulate(sizes))
    base = PREFIX_BYTES + len(raw)
    begins = [0, *ends[:-1]]
    written = list(map(str, ends))
    all_names = "".join(names)
    found = len(all_names) + len("".join(kinds)) + len("".join(places))
    if (
        found + _ENTRY_FIXED_LENGTH * len(names) + 1 != len(entries)
        or not entries.endswith("}}")
        or not all_names.isprintable()  # or else it may hold what JSON wants escaped
        or "\\" in all_names
        or list(map(",".join, zip(["0", *written], written, strict=False))) != list(places)
        or ends[-1] != data_bytes
        or len(set(names)) != len(names)
        or METADATA_KEY in names
    ):
        return None
    columns = zip(
        names,
        map({k: f[0] for k, f in facts.items() if f}.__getitem__, kinds),
        map({k: f[1] for k, f in facts.items() if f}.__getitem__, kinds),
        repeat(shard, len(names)),
        map(base.__add__, begins),
        sizes,
        strict=True,
    )
    return list(map(tuple.__new__, repeat(TensorEntry), columns)), metadata


def _parse_kind(kind: str) -> tuple[str, tuple[int, ...], int] | None:
    """Parse ``BF16","shape":[2,3`` into dtype, shape and bytes; None if it is not canonical."""
    dtype, _, axes = kind.partition(_KIND_MIDDLE)
    bits = DTYPE_BITS.get(dtype)
    if bits is None or not _AXES.fullmatch(axes):
        return None
    shape = tuple(map(int, axes.split(","))) if axes else ()
    total = total_bits(shape, bits)
    return None if total is None else (dtype, shape, total >> 3)


def total_bits(shape: Sequence[int], bits: int) -> int | None:
    """Return a tensor's size in bits; None for an impossible shape or a broken last byte."""
    if len(shape) > MAX_RANK or any(not 0 <= dim <= _MAX_DIM for dim in shape):
        return None
    # A zero hides the other axes from the size, but not from whoever computes strides.
    if 0 in shape and math.prod(dim for dim in shape if dim) > _MAX_DIM:
        return None
    total = math.prod(shape) * bits
    return None if total & 7 else total


def _parse_entry(
    name: str, info: Any, data_bytes: int, file: str
) -> tuple[str, tuple[int, ...], int, int]:
    """Check one entry by itself; return dtype, shape, and begin and end of its bytes."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"tensor {shown(name)} of {shown(file)} {what}")

    if not isinstance(info, dict):
        raise refuse("is not described by a JSON object")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in info:
            raise refuse(f"has no `{key}`")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or any(type(dim) is not int for dim in shape):
        raise refuse(f"has the shape {shown(shape)}, not a list of integers")
    total = total_bits(shape, DTYPE_BITS[dtype])
    if total is None:
        raise refuse(f"of {dtype} has the impossible shape {shown(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int for offset in offsets)
    ):
        raise refuse(f"has `data_offsets` {shown(offsets)}, not two integers")
    begin, end = offsets
    place = f"bytes {shown(begin)} to {shown(end)} of the data"
    if not 0 <= begin <= end:
        raise refuse(f"has impossible offsets: {place}")
    if end > data_bytes:
        raise refuse(f"takes {place}, but the file holds {data_bytes} (is it truncated?)")
    if 8 * (end - begin) != total:
        raise refuse(
            f"takes {place}, {end - begin} bytes; {dtype} {shown(shape)} needs {total >> 3}"
        )
    return dtype, tuple(shape), begin, end


def refuse_dense(raw: bytes, file: str) -> None:
    """Refuse a large text of little but brackets, which would take 30 times its size in memory.

    One that describes tensors has three containers in at least 28 bytes.

    Raises:
        CheckpointError: It is such a text.
    """
    if len(raw) > _DENSE_TEXT_BYTES and 8 * (raw.count(b"[") + raw.count(b"{")) > len(raw):
        raise CheckpointError(f"{shown(file)} nests too many containers for a header")


def load_json(raw: bytes, file: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: The bytes are none, or a key is there twice, at any depth.
    """
    try:
        text = raw.decode("utf-8")
        escaped = "\\" in text
        document = json.loads(text)
        # Without escapes a text has two quotes a string, and a dropped duplicate leaves some over.
        if escaped or text.count('"') != 2 * _count_strings(document):
            document = json.loads(text, object_pairs_hook=_unique)
        if escaped:
            _check_surrogates(document)
    except (ValueError, RecursionError, MemoryError) as exc:
        reason = one_line(exc) or type(exc).__name__
        raise CheckpointError(f"{shown(file)} is not valid JSON: {reason}") from exc
    if not isinstance(document, dict):
        raise CheckpointError(f"{shown(file)} is not a JSON object")
    return document


def _count_strings(node: Any) -> int:
    if isinstance(node, dict):
        if set(map(type, node.values())) <= {str}:
            return 2 * len(node)
        return len(node) + sum(map(_count_strings, node.values()))
    if isinstance(node, list):
        return sum(map(_count_strings, node))
    return isinstance(node, str)


def _check_surrogates(document: Any) -> None:
    # Half of a surrogate pair can come as an escape; no message and no file name takes it.
    json.dumps(document, ensure_ascii=False).encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}")
            seen.add(key)
    return document


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_METADATA_START = f'{{"{METADATA_KEY}":'
_KIND_MIDDLE = '","shape":['
# Loose, for what it finds is checked afterwards; but every part ends at a quote at the latest, or a
# hostile text would make it look to the end from every place.
_ENTRY = re.compile(
    r',"([^"]*)":\{"dtype":"([^"]*","shape":\[[0-9,]*)\],"data_offsets":\[([0-9,]*)\]\}'
)
_ENTRY_FIXED_LENGTH = len(',"":{"dtype":"],"data_offsets":[]}')
_AXES = re.compile(r"(?:(?:0|[1-9][0-9]{0,18})(?:,(?:0|[1-9][0-9]{0,18}))*)?")

"""Where tensors go in sllm-store's own format, for those who still run its server.

Its server reads files in direct I/O, so each is padded to pages. It packs records into device
memory by their sizes alone, so each record, with the padding behind it, is a multiple of 512 bytes
long: else one tensor of odd size would misalign all that follow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from sllmctl.core.checkpoint import natural_key
from sllmctl.core.dtypes import CODES
from sllmctl.core.header import TensorEntry, shown
from sllmctl.core.sllm_store import ALIGN_BYTES, PARTITION_BYTES, data_name
from sllmctl.core.write.layout import PAGE_BYTES, ShardLayout, TensorSpec
from sllmctl.errors import ConfigError

LOADABLE = frozenset({"F16", "BF16", "F32", "F64", "I8", "I16", "I32", "I64", "U8"})
"""What its loader takes. Source: sllm_store 0.8.0, ``stringToScalarType`` in checkpoint.cpp."""

_NAMES = {code: name for name, code in CODES.items()}


def plan_data_files(tensors: Iterable[TensorSpec], *, max_shard_bytes: int) -> list[ShardLayout]:
    """Distribute tensors over data files and place them.

    Args:
        tensors: In any order; names are unique.
        max_shard_bytes: A file is no larger, nor than 10 GiB, unless it holds a single tensor
            that is.

    Returns:
        At least one file. A tensor without elements is at the start of the first.

    Raises:
        ConfigError: sllm-store could not load a tensor.
    """
    limit = min(max_shard_bytes, PARTITION_BYTES)
    files: list[list[TensorEntry]] = [[]]
    position = 0
    for spec in sorted(tensors, key=lambda spec: (natural_key(spec.name), spec.name)):
        if spec.dtype not in LOADABLE:
            raise ConfigError(
                f"sllm-store does not load tensors of {spec.dtype}, as {shown(spec.name)} is",
                hint="leave out --format: a checkpoint of safetensors has all element types",
            )
        if spec.nbytes == 0:
            files[0].append(TensorEntry(spec.name, spec.dtype, spec.shape, 0, 0, 0))
            continue
        if position and _round_up(position + spec.nbytes, PAGE_BYTES) > limit:
            files.append([])
            position = 0
        files[-1].append(
            TensorEntry(spec.name, spec.dtype, spec.shape, len(files) - 1, position, spec.nbytes)
        )
        position += record_bytes(spec.nbytes)
    return [_layout(number, entries) for number, entries in enumerate(files)]


def _layout(number: int, entries: Sequence[TensorEntry]) -> ShardLayout:
    end = max((e.offset + record_bytes(e.nbytes) for e in entries), default=0)
    size = max(_round_up(end, PAGE_BYTES), PAGE_BYTES)
    return ShardLayout(data_name(number), b"", tuple(entries), size)


def record_bytes(nbytes: int) -> int:
    """Return the length of a record, its padding included, from the size of its tensor."""
    return _round_up(nbytes, ALIGN_BYTES)


def format_sllm_index(files: Sequence[ShardLayout], aliases: Mapping[str, str]) -> bytes:
    """Write the index, as Python's ``json`` does by default.

    Args:
        files: All of them.
        aliases: Tied name to the name of a tensor that is stored.
    """
    starts = [0, *accumulate(layout.size for layout in files)]
    lines = {
        entry.name: (
            starts[entry.shard] + entry.offset,
            record_bytes(entry.nbytes),
            entry.shape,
            _contiguous_stride(entry.shape),
            _NAMES[entry.dtype],
        )
        for layout in files
        for entry in layout.entries
    }
    lines |= {alias: lines[kept] for alias, kept in aliases.items()}
    names = sorted(lines, key=lambda name: (natural_key(name), name))
    return json.dumps({name: lines[name] for name in names}).encode()


def _contiguous_stride(shape: Sequence[int]) -> list[int]:
    steps = accumulate(reversed([max(axis, 1) for axis in shape]), int.__mul__, initial=1)
    return list(steps)[: len(shape)][::-1]


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple

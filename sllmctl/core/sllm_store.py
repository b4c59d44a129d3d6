"""sllm-store's own format, read without trust: `tensor.data_0`, `tensor.data_1`, … and an index.

The data files have no header; `tensor_index.json` says what is where, in offsets that count through
all of them. Nothing in it tells how long the files were when they were written, so what the writer
is known to damage is found by contradiction: a record past the end, across two files, or on top of
another, and a file that does not start with a record.

Source: sllm_store 0.8.0, ``torch.py`` (the index) and ``csrc/checkpoint/tensor_writer.cpp``.
"""

from __future__ import annotations

import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from sllmctl.core.dtypes import CODES, DTYPE_BITS, stored_shape
from sllmctl.core.fileio import errno_text, read_file
from sllmctl.core.header import (
    MAX_HEADER_BYTES,
    TensorEntry,
    collector_paused,
    load_json,
    one_line,
    refuse_dense,
    shown,
    total_bits,
)
from sllmctl.errors import CheckpointError

INDEX_NAME = "tensor_index.json"
MODULES_NAME = "no_split_modules.json"
TIED_NAME = "tied_no_split_modules.json"
ALIGN_BYTES = 512
"""Tensors start at its multiples in what we write, and records are as long."""

PARTITION_BYTES = 10 * 2**30
"""The writer starts another file rather than let a second record pass this size."""

_DATA_NAME = re.compile(r"tensor\.data_(0|[1-9][0-9]{0,8})")
_RANK_NAME = re.compile(r"rank_(0|[1-9][0-9]{0,5})")
_MAX_NUMBER = 2**63 - 1
_HINT = "convert the original model again: sllm-store can lose data without saying so"


class Record(NamedTuple):
    """One line of the index.

    ``dtype`` and ``shape`` are as safetensors states them, ``stride`` counts torch's elements;
    ``offset`` is in bytes from the start of the first data file, ``size`` the bytes of the storage.
    ``nbytes`` of them, from the first on, are the tensor's; ``contiguous`` says whether these are
    its elements in row-major order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    size: int
    nbytes: int
    contiguous: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the tensors of an index are.

    Attributes:
        entries: In file order; ``shard`` is the number of the data file. Without aliases.
        aliases: Names of tied tensors, each with the name of the one that is listed.
        strides: In torch's elements, of those tensors that are not contiguous.
        parts: Names of tensors that are smaller than their record, by more than padding.
    """

    entries: list[TensorEntry]
    aliases: dict[str, str]
    strides: dict[str, tuple[int, ...]]
    parts: tuple[str, ...]


def data_name(number: int) -> str:
    """Return the name of a data file."""
    return f"tensor.data_{number}"


def is_data_name(name: str) -> bool:
    """Whether a file's name is that of a data file, in use or left over."""
    return _DATA_NAME.fullmatch(name) is not None


def find_ranks(directory: Path) -> list[Path]:
    """The parts of a tensor-parallel save: directories ``rank_N`` with an index, in order."""
    try:
        matches = [m for p in directory.iterdir() if (m := _RANK_NAME.fullmatch(p.name))]
    except OSError:
        return []
    ranks = (directory / match[0] for match in sorted(matches, key=lambda m: int(m[1])))
    return [rank for rank in ranks if os.path.lexists(rank / INDEX_NAME)]


def read_sllm_store(directory: Path) -> tuple[Placed, list[tuple[Path, os.stat_result]]]:
    """Read the index of a directory, and compare it with the data files.

    Returns:
        Where the tensors are; and the data files up to the last that is used, at least one.

    Raises:
        CheckpointError: A file is missing or unreadable, or the two contradict each other.
    """
    path = directory / INDEX_NAME
    try:
        raw = read_file(path)
        matches = (_DATA_NAME.fullmatch(p.name) for p in directory.iterdir())
        numbers = {int(match[1]) for match in matches if match}
        files: list[tuple[Path, os.stat_result]] = []
        while len(files) in numbers:
            data = directory / data_name(len(files))
            status = data.stat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{shown(data)} is not a regular file")
            files.append((data, status))
    except OSError as exc:
        raise CheckpointError(f"cannot read {shown(exc.filename)}: {errno_text(exc)}") from exc
    if not files or (numbers - set(range(len(files))) and _ends(raw, path) > _total(files)):
        raise CheckpointError(
            f"`{directory / data_name(len(files))}` is missing",
            hint="the copy is incomplete",
        )
    placed = parse_sllm_index(raw, [status.st_size for _, status in files], str(path))
    used = placed.entries[-1].shard + 1 if placed.entries else 1
    return placed, files[:used]


def parts_warning(parts: tuple[str, ...]) -> str | None:
    """What a person should know of tensors that are smaller than their records."""
    if not parts:
        return None
    return (
        f"{len(parts)} {'tensor is' if len(parts) == 1 else 'tensors are'} part of a larger "
        f"storage, such as {shown(parts[0])}: sllm-store stores no offset in it, so one that did "
        "not start with its storage has the wrong bytes"
    )


def _ends(raw: bytes, path: Path) -> int:
    return max((r.offset + r.size for r in parse_records(raw, str(path))), default=0)


def _total(files: Iterable[tuple[Path, os.stat_result]]) -> int:
    return sum(status.st_size for _, status in files)


def parse_sllm_index(raw: bytes, sizes: Sequence[int], file: str) -> Placed:
    """Parse an index and place its records in the data files.

    Args:
        raw: The bytes of ``tensor_index.json``.
        sizes: Of the data files in bytes; at least one.
        file: Names the index in errors.

    Raises:
        CheckpointError: Anything is wrong; the message names file, tensor and numbers.
    """
    with collector_paused():
        return _place(parse_records(raw, file), sizes, file)


def parse_records(raw: bytes, file: str) -> list[Record]:
    """Parse an index, in its own order, without a look at the data.

    Raises:
        CheckpointError: It is no object of `[offset, size, shape, stride, dtype]`, or a tensor is
            impossible or does not fit into its own record.
    """
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{shown(file)} is {len(raw)} bytes long; the limit is {MAX_HEADER_BYTES}"
        )
    refuse_dense(raw, file)
    return [_parse_record(name, value, file) for name, value in load_json(raw, file).items()]


def _parse_record(name: str, value: Any, file: str) -> Record:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"tensor {shown(name)} of {shown(file)} {what}")

    if type(value) is not list or len(value) != 5:
        raise refuse("is not described by [offset, size, shape, stride, dtype]")
    offset, size, shape, stride, dtype = value
    for what, number in (("offset", offset), ("size", size)):
        if type(number) is not int or not 0 <= number <= _MAX_NUMBER:
            raise refuse(f"has the impossible {what} {shown(number)}")
    code = CODES.get(dtype) if type(dtype) is str else None
    if code is None:
        raise refuse(f"has the unknown dtype {shown(dtype)}")
    for what, axes in (("shape", shape), ("stride", stride)):
        if type(axes) is not list or any(
            type(axis) is not int or not 0 <= axis <= _MAX_NUMBER for axis in axes
        ):
            raise refuse(f"has the {what} {shown(axes)}, not a list of counts")
    if len(stride) != len(shape):
        raise refuse(f"has {len(shape)} axes and {len(stride)} strides")
    itemsize = max(8, DTYPE_BITS[code]) // 8  # torch packs two F4 into an element of a byte
    bits = total_bits(shape, 8 * itemsize)
    if bits is None or bits >> 3 > _MAX_NUMBER:
        raise refuse(f"of {code} has the impossible shape {shown(shape)}")
    reach = 0 if bits == 0 else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if reach * itemsize > size:
        raise refuse(f"needs {one_line(reach * itemsize)} bytes, and its record has {size}")
    return Record(
        name,
        code,
        stored_shape(code, shape),
        tuple(stride),
        offset,
        size,
        reach * itemsize,
        bits == 0 or _is_contiguous(shape, stride),
    )


def _is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1:
            if step != expected:
                return False
            expected *= length
    return True


def _place(records: Sequence[Record], sizes: Sequence[int], file: str) -> Placed:
    # What needs no bytes goes first, wherever it says it is: its place may be past the end.
    entries = [TensorEntry(r.name, r.dtype, r.shape, 0, 0, 0) for r in records if not r.nbytes]
    # Of several views of one record the longest comes last: ends grow as offsets do.
    filled = sorted((r for r in records if r.nbytes), key=attrgetter("offset", "size", "nbytes"))
    _refuse_overlaps(filled, file)
    ends = list(accumulate(sizes))
    starts = [0, *ends[:-1]]
    aliases: dict[str, str] = {}
    strides: dict[str, tuple[int, ...]] = {}
    parts: list[str] = []
    first_of: dict[tuple[Any, ...], str] = {}
    last = -1
    for record in filled:
        number = bisect_right(starts, record.offset) - 1
        begin, end = record.offset - starts[number], record.offset + record.size
        if end > ends[number]:
            raise _torn(record, number, sizes, ends, file)
        if number != last and begin:
            raise CheckpointError(
                f"`{data_name(number)}` starts with {begin} bytes of no tensor in {shown(file)}: "
                "a file before it is shorter than when it was written",
                hint=_HINT,
            )
        if begin and begin + record.size > PARTITION_BYTES:
            raise CheckpointError(
                f"tensor {shown(record.name)} of {shown(file)} ends at byte "
                f"{begin + record.size} of `{data_name(number)}`, where the writer had started "
                "another file: this one has been written over a longer one",
                hint=_HINT,
            )
        last = number
        key = (record.offset, record.size, record.dtype, record.shape, record.stride)
        if key in first_of:
            aliases[record.name] = first_of[key]
            continue
        first_of[key] = record.name
        entries.append(
            TensorEntry(record.name, record.dtype, record.shape, number, begin, record.nbytes)
        )
        if not record.contiguous:
            strides[record.name] = record.stride
        if record.size - record.nbytes >= ALIGN_BYTES:
            parts.append(record.name)
    return Placed(entries, aliases, strides, tuple(parts))


def _refuse_overlaps(records: Sequence[Record], file: str) -> None:
    for before, record in pairwise(records):
        if before.offset + before.size > record.offset and before[4:6] != record[4:6]:
            raise CheckpointError(
                f"tensors {shown(before.name)} and {shown(record.name)} of {shown(file)} overlap: "
                f"{before.size} bytes at {before.offset}, {record.size} at {record.offset}; "
                "one has been written over the other",
                hint=_HINT,
            )


def _torn(
    record: Record, number: int, sizes: Sequence[int], ends: Sequence[int], file: str
) -> CheckpointError:
    begin, end = record.offset, record.offset + record.size
    empty = next((number for number, size in enumerate(sizes) if size == 0), None)
    reason = f"the data files have {ends[-1]} (is `{data_name(len(sizes) - 1)}` truncated?)"
    if empty is not None:
        reason = f"`{data_name(empty)}` is empty"
    elif end <= ends[-1]:
        reason = f"`{data_name(number)}` ends at {ends[number]}"
    return CheckpointError(
        f"tensor {shown(record.name)} of {shown(file)} takes bytes {begin} to {end}, but {reason}",
        hint=_HINT,
    )

"""Read the index of any safetensors checkpoint: which tensor lies where in which file."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import eq, itemgetter
from pathlib import Path
from typing import Literal

from sllmctl.core.fileio import errno_text, read_file
from sllmctl.core.header import (
    PREFIX_BYTES,
    TensorEntry,
    collector_paused,
    parse_header,
    parse_index,
    parse_prefix,
    shown,
)
from sllmctl.core.manifest import Manifest, read_manifest
from sllmctl.core.sllm_store import INDEX_NAME as SLLM_INDEX_NAME
from sllmctl.core.sllm_store import data_name, find_ranks, read_sllm_store
from sllmctl.errors import CheckpointError, CheckpointNotFound

__all__ = [
    "Checkpoint",
    "Shard",
    "TensorEntry",
    "find_shards",
    "natural_key",
    "open_checkpoint",
    "open_shards",
    "parse_shard",
    "read_shard",
]

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
STATE_NAME = ".sllmctl-state"
"""In a directory that a conversion fills: its shards may have headers, and tensors of zeros."""

Format = Literal["safetensors", "sllm-store"]
_NUMBERS = re.compile(r"([0-9]+)")
_PART = re.compile(r"(.*-)(\d+)-of-(\d+)(\.\w+)")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint; sizes and offsets in bytes.

    ``stamp`` is the device, inode, size and modification time (ns) of the file whose header was
    read: what is opened later under its name must be that very file.
    """

    path: Path
    size: int
    data_offset: int
    stamp: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The index of a checkpoint.

    Attributes:
        path: The directory, or the one file, that was opened.
        shards: Files, in natural order of their names.
        tensors: By name, in file order: shard by shard, offset by offset. Without aliases.
        aliases: Names of tied tensors, each with the name under which its bytes are stored.
        metadata: Text metadata of the shards, without the aliases.
        manifest: What `convert` recorded, or None for a checkpoint that it did not write.
        format: ``safetensors`` or ``sllm-store``.
        strides: In elements, of tensors whose bytes are not their elements in row-major order:
            what `sllm-store` wrote alone has such.
    """

    path: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str]
    metadata: dict[str, str]
    manifest: Manifest | None
    format: Format = "safetensors"
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Sum of the tensors' bytes; aliases count once."""
        return sum(entry.nbytes for entry in self.tensors.values())


def open_checkpoint(path: Path, *, unfinished: bool = False) -> Checkpoint:
    """Open a checkpoint directory, or a single ``.safetensors`` file, and check its structure.

    A directory holds ``model.safetensors``, or an index ``*.safetensors.index.json``, or any
    number of ``*.safetensors`` files with disjoint names; or else what `sllm-store` writes. No
    tensor data is read. What a conversion has not finished is refused, unless ``unfinished``.

    Raises:
        CheckpointNotFound: There is no such path, or no safetensors file in it, or none of those
            that its index names.
        CheckpointError: The checkpoint is damaged, hostile or incomplete.
    """
    path = Path(path)
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
        listed = [entry.name for entry in path.iterdir()] if is_directory else []
    except FileNotFoundError as exc:
        raise CheckpointNotFound(f"no checkpoint at `{path}`: no such path") from exc
    except (OSError, ValueError) as exc:
        reason = errno_text(exc) if isinstance(exc, OSError) else exc
        raise CheckpointError(f"cannot open {shown(path)}: {reason}") from exc
    if not is_directory:
        if path.suffix != SUFFIX:
            raise CheckpointNotFound(
                f"`{path}` is not a safetensors file",
                hint="give a checkpoint's directory, or a file that ends in .safetensors",
            )
        return open_shards(path.parent, [path.name], None, path=path)
    if not unfinished:
        require_finished(path, listed)
    if holds_sllm_store(listed):
        return open_sllm_store(path, manifest=read_manifest(path))
    index_name, names = find_shards(path, listed)
    manifest = read_manifest(path)
    if index_name is None:
        require_all_parts(path, names)
        return open_shards(path, names, None, manifest=manifest)
    index_path = path / index_name
    weight_map = parse_index(read_file(index_path), str(index_path))
    names = sorted(set(weight_map.values()), key=natural_key)
    if not any(os.path.lexists(path / name) for name in names):
        raise CheckpointNotFound(
            f"no checkpoint in `{path}`: none of the {len(names)} files that `{index_name}` names",
            hint="the download or copy is incomplete",
        )
    return open_shards(path, names, (index_name, weight_map), manifest=manifest)


def find_shards(directory: Path, names: Sequence[str]) -> tuple[str | None, list[str]]:
    """Choose the files that make up a checkpoint from the names in its directory.

    Returns:
        The index's name, if there is one to follow, and otherwise the shards' names.

    Raises:
        CheckpointNotFound: No safetensors file is there.
        CheckpointError: Several indexes are, and none has the usual name.
    """
    shards = sorted((n for n in names if n.endswith(SUFFIX) and n != SUFFIX), key=natural_key)
    indexes = sorted(n for n in names if n.endswith(INDEX_SUFFIX))
    # The order in which transformers looks: the single file, then the index.
    if SINGLE_NAME in shards:
        return None, [SINGLE_NAME]
    if INDEX_NAME in indexes:
        return INDEX_NAME, []
    if len(indexes) > 1:
        raise CheckpointError(
            f"`{directory}` has {len(indexes)} indexes and none is called `{INDEX_NAME}`: "
            + ", ".join(map(shown, indexes[:4]))
        )
    if indexes:
        return indexes[0], []
    if not shards:
        raise _not_found(directory, names)
    return None, shards


def require_finished(directory: Path, names: Collection[str]) -> None:
    """Check that a directory is none that a conversion fills, or left when it was killed.

    Raises:
        CheckpointError: It is one.
    """
    if STATE_NAME in names:
        raise CheckpointError(
            f"`{directory}` is what a conversion has not finished",
            hint="convert the model again: it goes on where it stopped",
        )


def all_parts(names: Iterable[str]) -> set[str]:
    """The files that names such as ``model-00001-of-00002.safetensors`` promise."""
    promised = set()
    for match in filter(None, map(_PART.fullmatch, names)):
        stem, number, count, suffix = match.groups()
        for i in range(1, int(count[:6]) + 1):
            promised.add(f"{stem}{i:0{len(number)}}-of-{count}{suffix}")
    return promised


def require_all_parts(directory: Path, names: Sequence[str]) -> None:
    """Check that files which no index lists are all there, as far as their names tell.

    Raises:
        CheckpointError: One is missing.
    """
    missing = all_parts(names).difference(names)
    if missing:
        raise CheckpointError(
            f"{shown(min(missing))} is missing from `{directory}`: the other files' names count it",
            hint="the download or copy is incomplete",
        )


def _not_found(directory: Path, names: Sequence[str]) -> CheckpointNotFound:
    what, hint = f"no *{SUFFIX} file", "`sllmctl convert` converts other weight files"
    ranks = find_ranks(directory)
    if ranks:
        what = f"it holds {len(ranks)} ranks that `sllm-store` saved of a model in parallel"
        hint = f"load one of them, such as `{ranks[0]}`, or convert them all"
    elif data_name(0) in names:
        what = f"`{data_name(0)}` is there, and `{SLLM_INDEX_NAME}` is not"
        hint = "the copy is incomplete"
    return CheckpointNotFound(f"no checkpoint in `{directory}`: {what}", hint=hint)


def holds_sllm_store(names: Sequence[str]) -> bool:
    """Whether names in a directory are those of `sllm-store`'s format, and no safetensors."""
    return SLLM_INDEX_NAME in names and not any(n.endswith((SUFFIX, INDEX_SUFFIX)) for n in names)


def open_sllm_store(directory: Path, *, manifest: Manifest | None = None) -> Checkpoint:
    """Open a directory that `sllm-store` wrote, or that is as if: its data files are the shards.

    Raises:
        CheckpointError: It is damaged, hostile or incomplete.
    """
    placed, files = read_sllm_store(directory)
    shards = [
        Shard(file, s.st_size, 0, (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))
        for file, s in files
    ]
    return Checkpoint(
        directory,
        tuple(shards),
        {entry.name: entry for entry in placed.entries},
        placed.aliases,
        {},
        manifest,
        "sllm-store",
        placed.strides,
    )


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that orders numbers in names by value: ``layers.2`` before ``layers.10``."""
    parts = _NUMBERS.split(name)
    return tuple(
        (1, int(part), "") if i % 2 and len(part) < 19 else (0, 0, part)
        for i, part in enumerate(parts)
    )


ParsedShard = tuple[Shard, list[TensorEntry], dict[str, str]]
"""A shard, its tensors in file order, its metadata."""


def read_shard(path: Path, shard: int = 0) -> ParsedShard:
    """Read one file's header.

    Raises:
        CheckpointError: The file is missing, unreadable or malformed.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"shard {shown(path)} is missing", hint="the download or copy is incomplete"
        ) from exc
    except (OSError, ValueError) as exc:
        reason = errno_text(exc) if isinstance(exc, OSError) else exc
        raise CheckpointError(f"cannot open {shown(path)}: {reason}") from exc
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{shown(path)} is not a regular file")
        # Without this the kernel reads ahead into the tensors, which the load then reads again.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        return parse_shard(path, status.st_size, partial(_pread, fd), shard, stamp)
    except OSError as exc:
        raise CheckpointError(f"cannot read the header of `{path}`: {errno_text(exc)}") from exc
    finally:
        os.close(fd)


def parse_shard(
    path: Path,
    size: int,
    read: Callable[[int, int], bytes],
    shard: int = 0,
    stamp: tuple[int, int, int, int] | None = None,
) -> ParsedShard:
    """Read a header from wherever a shard's bytes are.

    Args:
        path: What the shard is called.
        size: Of all its bytes.
        read: Given a length and an offset, returns those bytes, or fewer at the end.
        shard: Its number.
        stamp: Of its file, if there is one.

    Raises:
        CheckpointError: It is malformed.
    """
    length = parse_prefix(read(PREFIX_BYTES, 0), size, str(path))
    raw = read(length, PREFIX_BYTES)
    if len(raw) != length:
        raise CheckpointError(f"`{path}` shrank while its header was read")
    data_offset = PREFIX_BYTES + length
    entries, metadata = parse_header(raw, size - data_offset, str(path), shard=shard)
    return Shard(path, size, data_offset, stamp), entries, metadata


def _pread(fd: int, length: int, offset: int) -> bytes:
    parts = []
    while length:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return b"".join(parts)


@collector_paused()
def open_shards(
    directory: Path,
    names: Sequence[str],
    index: tuple[str, dict[str, str]] | None,
    *,
    path: Path | None = None,
    manifest: Manifest | None = None,
    read: Callable[[Path, int], ParsedShard] = read_shard,
) -> Checkpoint:
    """Read the headers of chosen files and check that together they make a checkpoint.

    Args:
        directory: Where the files are.
        names: The files, relative to it.
        index: Name and content of the index that must agree with them, if there is one.
        path: What the checkpoint says it was opened from, where that is not the directory.
        manifest: Goes into the result.
        read: Reads the header of a file, given its path and number.

    Raises:
        CheckpointError: A file is missing or malformed, or contradicts another or the index.
    """
    shards: list[Shard] = []
    tensors: dict[str, TensorEntry] = {}
    claims: dict[str, tuple[str, int]] = {}
    metadata: dict[str, str] = {}
    for number, name in enumerate(names):
        shard, entries, texts = read(directory / name, number)
        shards.append(shard)
        found = dict(zip(map(itemgetter(0), entries), entries, strict=True))
        if not tensors.keys().isdisjoint(found):
            twice = next(iter(tensors.keys() & found))
            first = shards[tensors[twice].shard].path.name
            raise CheckpointError(
                f"tensor {shown(twice)} is in two shards of `{directory}`: "
                f"{shown(first)} and {shown(name)}"
            )
        tensors.update(found)
        for key, value in texts.items():
            if key != "format":
                claims[key] = (value, number)
    aliases: dict[str, str] = {}
    for key, (value, number) in claims.items():
        kept = tensors.get(value)
        if kept is not None and kept.shard == number and key not in tensors:
            aliases[key] = value
        else:
            metadata[key] = value
    if index is not None:
        _check_index(directory / index[0], index[1], names, tensors, aliases)
    return Checkpoint(path or directory, tuple(shards), tensors, aliases, metadata, manifest)


def _check_index(
    path: Path,
    weight_map: dict[str, str],
    names: Sequence[str],
    tensors: dict[str, TensorEntry],
    aliases: dict[str, str],
) -> None:
    files = map(names.__getitem__, map(itemgetter(3), tensors.values()))
    if len(weight_map) == len(tensors) and all(map(eq, map(weight_map.get, tensors), files)):
        return
    for name, file in weight_map.items():
        entry = tensors.get(aliases.get(name, name))
        if entry is None or names[entry.shard] != file:
            place = "no shard has it" if entry is None else f"`{names[entry.shard]}` has it"
            raise CheckpointError(
                f"`{path}` says that tensor {shown(name)} is in {shown(file)}, but {place}"
            )

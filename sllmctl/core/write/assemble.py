"""Write a whole checkpoint directory: shards, index, the files beside them, manifest."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sllmctl import __version__
from sllmctl.core.checkpoint import INDEX_NAME, SINGLE_NAME, Format, open_checkpoint
from sllmctl.core.fileio import Buffer, SourceFile
from sllmctl.core.manifest import (
    CHUNK_BYTES,
    MANIFEST_NAME,
    FileDigest,
    Manifest,
    Origin,
    ShardDigest,
    format_manifest,
)
from sllmctl.core.oscalls import start_writeback
from sllmctl.core.progress import ProgressFn
from sllmctl.core.scan import scan_files
from sllmctl.core.sllm_store import INDEX_NAME as SLLM_INDEX_NAME
from sllmctl.core.write.layout import ShardLayout, format_index, plan_shards
from sllmctl.core.write.sllm_store_layout import format_sllm_index, plan_data_files
from sllmctl.core.write.sources import FoundFile, Weights
from sllmctl.core.write.target import Target
from sllmctl.core.write.writer import plan_pieces, write_all, write_error, write_shards
from sllmctl.errors import ChecksumMismatch, ConfigError

_COPY_BYTES = 4 * 2**20
_SPARE_BYTES = 2**20
"""Left free beyond the files' own bytes, for directories and the manifest."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a checkpoint is to be made.

    Attributes:
        target: Its directory.
        fingerprint: Identifies source and options.
        origin: Where its source is from.
        dtype: The dtype policy, for the manifest.
        max_shard_bytes: A shard is no larger, unless a single tensor is.
        force: Replace a checkpoint that is there.
        verify: Read the shards back from the disk.
        format: Of the weights.
        single_name: Name of a safetensors file that is the only one.
    """

    target: Path
    fingerprint: str
    origin: Origin
    dtype: str
    max_shard_bytes: int
    force: bool
    verify: bool
    format: Format = "safetensors"
    single_name: str = SINGLE_NAME


@dataclass(frozen=True, slots=True)
class Assembled:
    """What was written, how long it took in seconds, and how many shards were there already."""

    manifest: Manifest
    write_s: float
    verify_s: float
    resumed: int


def assemble(
    recipe: Recipe,
    weights: Weights,
    *,
    copies: Sequence[FoundFile] = (),
    files: Mapping[str, bytes] | None = None,
    check_source: Callable[[], None] | None = None,
    progress: ProgressFn | None = None,
) -> Assembled:
    """Write a checkpoint, and put it in its place in one step.

    Args:
        recipe: What to make.
        weights: Its tensors. They are closed when nobody reads them any more.
        copies: Files that go along as they are.
        files: Files that go along, by relative name.
        check_source: Called before the checkpoint is put in its place; may raise.
        progress: Called with stages ``convert`` and ``verify``.

    Raises:
        CheckpointError: The target cannot be written.
        ChecksumMismatch: What was written does not read back.
        ConfigError: The target may not be replaced, or its disk is too small.
        ReadError: A file of the source cannot be read.
    """
    started = time.perf_counter()
    handed_over = False
    try:
        layouts, indexes = _plan(recipe, weights)
        with Target(recipe.target, fingerprint=recipe.fingerprint, force=recipe.force) as target:
            digests = {
                layout.name: target.done[layout.name]
                for layout in layouts
                if layout.name in target.done and target.done[layout.name].size == layout.size
            }
            resumed = len(digests)
            to_write = [layout for layout in layouts if layout.name not in digests]
            written = {**(files or {}), **indexes}
            others_bytes = sum(map(len, written.values())) + sum(file.size for file in copies)
            _require_space(
                target.directory, sum(layout.size for layout in to_write) + others_bytes, recipe
            )
            others = [_write_file(target.directory, *item) for item in written.items()]
            others += [copy_file(target.directory, file) for file in copies]

            def on_written(digest: ShardDigest) -> None:
                target.record(digest)
                digests[digest.name] = digest

            handed_over = True
            write_shards(
                [(layout, plan_pieces(layout, weights.sources)) for layout in to_write],
                target.directory,
                on_written=on_written,
                total_bytes=sum(layout.size for layout in layouts),
                done_bytes=sum(digest.size for digest in digests.values()),
                progress=progress,
                at_end=weights.close,
            )
            shards = [digests[layout.name] for layout in layouts]
            write_s = time.perf_counter() - started
            verify_s = 0.0
            if recipe.verify:
                read_back(target.directory, shards, progress)
                verify_s = time.perf_counter() - started - write_s
            # What our own reader refuses must never take the place of a checkpoint.
            open_checkpoint(target.directory, unfinished=True)
            manifest = _manifest(recipe, layouts, shards, others)
            _write_file(target.directory, MANIFEST_NAME, format_manifest(manifest))
            if check_source is not None:
                check_source()
            target.publish()
    except BaseException:
        if not handed_over:
            weights.close()
        raise
    return Assembled(manifest, write_s, verify_s, resumed)


def _plan(recipe: Recipe, weights: Weights) -> tuple[list[ShardLayout], dict[str, bytes]]:
    """Lay the weights out; also the index of the files by its name, if there is to be one."""
    if recipe.format == "sllm-store":
        layouts = plan_data_files(weights.tensors, max_shard_bytes=recipe.max_shard_bytes)
        return layouts, {SLLM_INDEX_NAME: format_sllm_index(layouts, weights.aliases)}
    layouts = plan_shards(
        weights.tensors,
        aliases=weights.aliases,
        metadata=weights.metadata,
        max_shard_bytes=recipe.max_shard_bytes,
        single_name=recipe.single_name,
    )
    return layouts, {INDEX_NAME: format_index(layouts)} if len(layouts) > 1 else {}


def read_back(
    directory: Path, shards: Sequence[ShardDigest], progress: ProgressFn | None = None
) -> None:
    """Read shards from the disk, around the page cache, and compare their digests.

    Raises:
        ChecksumMismatch: A chunk differs; the disk did not keep what was written.
        ReadError: A shard cannot be read.
    """

    def compare(number: int, chunk: int, digest: bytes) -> None:
        if digest != shards[number].chunk_digest(chunk):
            start = chunk * CHUNK_BYTES
            end = min(start + CHUNK_BYTES, shards[number].size)
            raise ChecksumMismatch(
                f"`{directory / shards[number].name}` does not read back as it was written "
                f"between bytes {start} and {end}",
                hint="the disk or the memory of this machine is faulty",
            )

    scan_files(
        [(directory / shard.name, shard.size) for shard in shards],
        chunk_bytes=CHUNK_BYTES,
        bypass_cache=True,
        on_chunk=compare,
        progress=progress,
    )


def _require_space(directory: Path, nbytes: int, recipe: Recipe) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes + _SPARE_BYTES:
        raise ConfigError(
            f"`{recipe.target}` needs {nbytes + _SPARE_BYTES} bytes of disk space, "
            f"and {free} are free",
            hint="free some space, or choose another disk with --output or --storage-path",
        )


def _manifest(
    recipe: Recipe,
    layouts: Sequence[ShardLayout],
    shards: Sequence[ShardDigest],
    others: Sequence[FileDigest],
) -> Manifest:
    entries = [entry for layout in layouts for entry in layout.entries]
    return Manifest(
        tool=f"sllmctl {__version__}",
        origin=recipe.origin,
        dtype=recipe.dtype,
        fingerprint=recipe.fingerprint,
        tensors=len(entries),
        bytes=sum(entry.nbytes for entry in entries),
        shards=tuple(shards),
        files=tuple(sorted(others, key=lambda file: file.name)),
    )


def _write_file(directory: Path, name: str, data: bytes) -> FileDigest:
    """Write a small file and make it durable."""
    path = directory / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as file:
            write_all(file.fileno(), memoryview(data), 0, path)
            os.fsync(file.fileno())
    except OSError as exc:
        raise write_error(path, 0, exc) from exc
    return FileDigest(name, len(data), xxhash.xxh3_128_hexdigest(data))


def copy_file(directory: Path, file: FoundFile) -> FileDigest:
    """Copy a file of any size and make it durable; digest it on the way.

    Raises:
        CheckpointError: It cannot be written.
        ReadError: It cannot be read.
    """
    path = directory / file.name
    hasher = xxhash.xxh3_128()
    source = SourceFile(file.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = Buffer(min(_COPY_BYTES, source.size))
        with path.open("wb", buffering=0) as copy:
            for start in range(0, source.size, _COPY_BYTES):
                nbytes = min(_COPY_BYTES, source.size - start)
                source.read_into(start, buffer, 0, nbytes)
                hasher.update(buffer.view[:nbytes])
                write_all(copy.fileno(), buffer.view[:nbytes], start, path)
                start_writeback(copy.fileno(), start, nbytes)
            os.fsync(copy.fileno())
    except OSError as exc:
        raise write_error(path, 0, exc) from exc
    finally:
        source.close()
    return FileDigest(file.name, source.size, hasher.hexdigest())

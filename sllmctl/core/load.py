"""Load a checkpoint into host memory: resident files are mapped, all others are read."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sllmctl.core.checkpoint import Checkpoint, Shard
from sllmctl.core.digest import ShardCheck, Verification, memory_reader, shard_checks
from sllmctl.core.host import available_memory_bytes
from sllmctl.core.progress import BytesFn, ProgressFn, report
from sllmctl.core.tensors import TensorBuilder
from sllmctl.core.units import format_size, parse_size
from sllmctl.core.views import View, bring_in, map_shards, missing_parts
from sllmctl.errors import CheckpointError, ConfigError, HostMemoryError
from sllmctl.native import PAGE_BYTES, Extent, Job, Memory, Progress

if TYPE_CHECKING:
    import torch

MapMode = Literal["auto", "never", "always"]
MAX_THREADS = 64
_MAX_CHUNK_BYTES = 2**30
_VERIFY_SLICE_MS = 20
_IN_PLACE_HINT = "replace checkpoints by rename, never in place, and load again"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load.

    Attributes:
        map_files: ``auto`` maps files that are in the page cache, or come there in huge pages;
            ``never`` always copies;
            ``always`` maps every local file, for processes that share the page cache.
        verify: Compare every byte with the digests of the conversion. Implies copying, unless files
            are mapped ``always``.
        threads: Reader threads; 0 for the library's choice.
        chunk_bytes: Largest read, a multiple of 4096; 0 for the library's choice.
    """

    map_files: MapMode = "auto"
    verify: bool = False
    threads: int = 0
    chunk_bytes: int = 0

    @classmethod
    def choose(
        cls,
        *,
        map_files: str | None = None,
        verify: bool = False,
        threads: int | None = None,
        chunk_size: str | int | None = None,
    ) -> LoadOptions:
        """Check options, and take ``SLLMCTL_MAP``, ``_THREADS``, ``_CHUNK_SIZE`` for missing ones.

        Raises:
            ConfigError: A value makes no sense.
        """
        mode = map_files or os.environ.get("SLLMCTL_MAP") or "auto"
        if mode not in ("auto", "never"):
            raise ConfigError(f"`{mode}` is not a way to map files", hint="use auto or never")
        count = threads if threads is not None else os.environ.get("SLLMCTL_THREADS")
        if count not in (None, "") and str(count) not in map(str, range(1, MAX_THREADS + 1)):
            raise ConfigError(
                f"cannot use `{count}` reader threads", hint=f"use 1 to {MAX_THREADS}"
            )
        size = chunk_size or os.environ.get("SLLMCTL_CHUNK_SIZE") or 0
        chunk_bytes = size if isinstance(size, int) else parse_size(size)
        if chunk_bytes % PAGE_BYTES or chunk_bytes > _MAX_CHUNK_BYTES:
            raise ConfigError(
                f"a chunk of {chunk_bytes} bytes is not a multiple of {PAGE_BYTES} up to 1GiB",
                hint="write it like 16MiB",
            )
        return cls("never" if mode == "never" else "auto", verify, int(count or 0), chunk_bytes)


@dataclass(slots=True)
class LoadStats:
    """What a load did: bytes of tensors by where they came from, seconds by stage.

    ``mapped_bytes`` were mapped and not copied; ``brought_in_bytes``, of those from the disk, were
    read into the page cache for that.
    """

    tensors: int = 0
    bytes: int = 0
    disk_bytes: int = 0
    page_cache_bytes: int = 0
    store_bytes: int = 0
    mapped_bytes: int = 0
    brought_in_bytes: int = 0
    open_s: float = 0.0
    plan_s: float = 0.0
    read_s: float = 0.0
    copy_s: float = 0.0
    build_s: float = 0.0
    elapsed_s: float = 0.0
    verified: bool = False

    def count_tensors_alone(self) -> None:
        """Leave bytes that are no tensor's, such as padding, out of where they came from.

        Safetensors has none; a tensor that looks into the bytes of another adds none.
        """
        moved = self.disk_bytes + self.page_cache_bytes + self.store_bytes
        self.bytes = min(self.bytes, moved)
        padding = moved - self.bytes
        for source in ("disk_bytes", "page_cache_bytes", "store_bytes"):
            counted = getattr(self, source)
            setattr(self, source, max(0, counted - padding))
            padding -= min(counted, padding)
        self.mapped_bytes = min(self.mapped_bytes, self.bytes)
        self.brought_in_bytes = min(self.brought_in_bytes, self.disk_bytes)


@dataclass(slots=True)
class Loaded:
    """Tensors by name, aliases included as the same objects, and how they came."""

    tensors: dict[str, torch.Tensor]
    stats: LoadStats


def load(
    checkpoint: Checkpoint, options: LoadOptions, *, progress: ProgressFn | None = None
) -> Loaded:
    """Load every tensor of a checkpoint into host memory.

    Shards that lie in the page cache, or come there in huge pages, become private copy-on-write
    views of it: nothing is copied, and what is missing is brought in. All others are read into
    fresh memory, cached chunks from the cache and the rest around it. No write to a tensor reaches
    the file.

    Raises:
        ReadError: A file is too short, unreadable, or changed while it was read.
        ChecksumMismatch: ``verify`` found a byte that differs from the conversion.
        CheckpointError: ``verify`` without digests, or a dtype that this torch lacks.
        HostMemoryError: The checkpoint does not fit into memory.
    """
    started = time.perf_counter()
    builder = TensorBuilder(checkpoint)
    stats = LoadStats(len(checkpoint.tensors) + len(checkpoint.aliases), checkpoint.nbytes)
    with ExitStack() as stack:
        fds = [open_shard(shard, stack) for shard in checkpoint.shards]
        stamps = [stamp_of(fd) for fd in fds]
        stats.open_s = time.perf_counter() - started
        memories, views = _place(checkpoint.shards, fds, options, stats)
        places = [
            (memory, shard.data_offset)
            for memory, shard in zip(memories, checkpoint.shards, strict=True)
        ]
        readers = [memory_reader(*place) for place in places]
        checks = shard_checks(checkpoint, fds, readers) if options.verify else []
        stats.plan_s = time.perf_counter() - started - stats.open_s
        planned = time.perf_counter()
        to_read = [
            number
            for number, shard in enumerate(checkpoint.shards)
            if views[number] is None and shard.size > shard.data_offset
        ]
        parts = missing_parts(views)
        direct = sum(memories[number].nbytes for number in to_read)
        total = direct + sum(part.nbytes for part in parts)
        if to_read:
            done = report(progress, total)
            now = _read(checkpoint.shards, fds, memories, to_read, checks, options, done)
            stats.disk_bytes += now.bytes_disk
            stats.page_cache_bytes += now.bytes_cache
        if parts:
            bring_in(parts, options, report(progress, total, direct))
            stats.brought_in_bytes = sum(part.missing_bytes for part in parts)
            stats.disk_bytes += stats.brought_in_bytes
            stats.page_cache_bytes -= stats.brought_in_bytes
        if checks:
            Verification.of_all([checks[n] for n, view in enumerate(views) if view is not None])
        if to_read or parts or checks:
            stats.read_s = time.perf_counter() - planned
        built = time.perf_counter()
        tensors = builder.build(checkpoint.tensors.values(), places)
        for alias, kept in checkpoint.aliases.items():
            tensors[alias] = tensors[kept]
        for shard, fd, stamp in zip(checkpoint.shards, fds, stamps, strict=True):
            check_stamp(shard, fd, stamp)
    stats.build_s = time.perf_counter() - built
    stats.count_tensors_alone()
    stats.verified = options.verify
    stats.elapsed_s = time.perf_counter() - started
    return Loaded(tensors, stats)


def open_shard(shard: Shard, stack: ExitStack) -> int:
    """Open a shard for reading; the stack closes it.

    Raises:
        CheckpointError: It cannot be opened, or is not the file whose header was read.
    """
    try:
        fd = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise CheckpointError(f"cannot open shard `{shard.path}`: {exc.strerror}") from exc
    stack.callback(os.close, fd)
    found = os.fstat(fd)
    if found.st_size != shard.size:
        raise CheckpointError(
            f"`{shard.path}` changed from {shard.size} to {found.st_size} bytes "
            "since its header was read",
            hint=_IN_PLACE_HINT,
        )
    if shard.stamp not in (None, (found.st_dev, found.st_ino, *stamp_of(fd))):
        raise CheckpointError(
            f"`{shard.path}` was replaced since its header was read", hint="load it again"
        )
    return fd


def stamp_of(fd: int) -> tuple[int, int]:
    """Size and modification time: a file that was written to has another stamp."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def check_stamp(shard: Shard, fd: int, stamp: tuple[int, int]) -> None:
    """Refuse a file that was written to since `stamp_of`.

    Raises:
        CheckpointError: It was.
    """
    if stamp_of(fd) != stamp:
        raise CheckpointError(f"`{shard.path}` changed while it was loaded", hint=_IN_PLACE_HINT)


def check_memory(needed_bytes: int) -> None:
    """Refuse a load that cannot fit, before the kernel answers it with SIGKILL.

    Raises:
        HostMemoryError: Less is available than needed.
    """
    if needed_bytes and needed_bytes > (available := available_memory_bytes()):
        raise HostMemoryError(
            f"the load needs {format_size(needed_bytes)} of memory, and "
            f"{format_size(available)} are available",
            hint="use `stream_tensors`, free memory, or raise the container's limit",
        )


def _place(
    shards: Sequence[Shard], fds: Sequence[int], options: LoadOptions, stats: LoadStats
) -> tuple[list[Memory], list[View | None]]:
    """Give each shard a view or fresh memory, which has to be read."""
    views = map_shards(shards, fds, options)
    sizes = [shard.size - shard.data_offset for shard in shards]
    stats.mapped_bytes = sum(size for size, view in zip(sizes, views, strict=True) if view)
    stats.page_cache_bytes = stats.mapped_bytes
    check_memory(sum(sizes) - stats.mapped_bytes)
    memories = [
        view.memory if view else Memory.create(max(size, 1), shard.data_offset)
        for view, size, shard in zip(views, sizes, shards, strict=True)
    ]
    return memories, views


def _read(
    shards: Sequence[Shard],
    fds: Sequence[int],
    memories: Sequence[Memory],
    to_read: Sequence[int],
    checks: Sequence[ShardCheck],
    options: LoadOptions,
    report_done: BytesFn | None,
) -> Progress:
    """Bring shards into fresh memory, and compare their bytes where that is asked for."""
    extents = [
        Extent(number, shards[i].data_offset, memories[i].nbytes, memories[i].address)
        for number, i in enumerate(to_read)
    ]
    with (
        Job(
            [(fds[i], str(shards[i].path)) for i in to_read],
            extents,
            keep=memories,
            chunk_bytes=checks[0].chunk_bytes if checks else options.chunk_bytes,
            threads=options.threads,
        ) as job,
        Verification([checks[i] for i in to_read]) if checks else nullcontext() as verification,
    ):
        done = False
        while not done:
            done, now = job.wait(_VERIFY_SLICE_MS if checks else None)
            if verification is not None:
                verification.take_up(job.chunks_done)
            if report_done is not None:
                report_done(now.bytes_done)
        if verification is not None:
            verification.finish()
    return now

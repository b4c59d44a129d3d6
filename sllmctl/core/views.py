"""Views of files in the page cache: nothing is copied, and what they lack there is brought in."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllmctl.core.host import available_memory_bytes
from sllmctl.core.progress import ProgressFn
from sllmctl.native import PAGE_BYTES, Extent, Job, Memory, probe_file

if TYPE_CHECKING:
    from sllmctl.core.checkpoint import Shard
    from sllmctl.core.load import LoadOptions

log = logging.getLogger(__name__)

_MOSTLY = 3 / 4
"""With so much in the page cache, reading the rest into it takes less time than copying it all."""
_PIECE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class View:
    """A shard's data as the page cache has it; ``missing_bytes`` of that are not there yet."""

    memory: Memory
    missing_bytes: int


def map_shard(shard: Shard, fd: int, options: LoadOptions, least: float = 1.0) -> View | None:
    """A view of a shard's data where that is a fair bet: local, and in the page cache.

    Args:
        shard: What is mapped.
        fd: Its file, open.
        options: Whether to map at all.
        least: How much of it has to be in the page cache, of 1.
    """
    nbytes = shard.size - shard.data_offset
    # What is verified is copied, or it might change afterwards; not for those who share it anyway.
    copied = options.map_files == "never" or (options.verify and options.map_files != "always")
    if copied or nbytes == 0:
        return None
    facts = probe_file(fd, str(shard.path), shard.data_offset, nbytes)
    missing = nbytes - facts.resident_bytes
    if not facts.local or not (
        options.map_files == "always" or (facts.residency_known and missing <= (1 - least) * nbytes)
    ):
        return None
    memory = Memory.map_file(fd, str(shard.path), shard.data_offset, nbytes)
    if not memory.writable:
        log.warning(
            "`%s` is mapped read-only, since this machine does not overcommit memory: "
            "do not write to its tensors, or load with --map never",
            shard.path,
        )
    return View(memory, missing)


def map_mostly(shard: Shard, fd: int, options: LoadOptions) -> View | None:
    """`map_shard` of what is in the page cache nearly whole, where there is room for the rest."""
    view = map_shard(shard, fd, options, _MOSTLY)
    if view is None or options.map_files == "always":
        # Page faults bring in what is used; digests use all of it.
        return view if view is None or options.verify else View(view.memory, 0)
    fits = not view.missing_bytes or view.missing_bytes <= available_memory_bytes() // 2
    return view if fits else None


def bring_in(
    views: Sequence[tuple[Shard, int, View | None]],
    *,
    threads: int,
    progress: ProgressFn | None,
) -> int:
    """Read what views lack into the page cache, so that no tensor has to wait for the disk.

    Args:
        views: Shards, open files, and their views.
        threads: Reader threads; 0 for the library's choice.
        progress: Called with stage ``read``.

    Returns:
        How many bytes that were.

    Raises:
        ReadError: The disk fails, or a file changed.
    """
    lacking = [(shard, fd) for shard, fd, view in views if view and view.missing_bytes]
    holes = [
        (number, offset, nbytes)
        for number, (shard, fd) in enumerate(lacking)
        for offset, nbytes in _holes(fd, str(shard.path), shard.data_offset, shard.size)
    ]
    if not holes:
        return 0
    # Read for the cache alone: all of it lands in the same place.
    scratch = Memory.create(_PIECE_BYTES + PAGE_BYTES)
    extents = [
        Extent(number, offset, nbytes, scratch.address + offset % PAGE_BYTES)
        for number, offset, nbytes in holes
    ]
    files = [(fd, str(shard.path)) for shard, fd in lacking]
    with Job(files, extents, keep=scratch, threads=threads, direct=False) as job:
        done = False
        while not done:
            done, now = job.wait()
            if progress is not None:
                progress("read", now.bytes_done, now.bytes_total)
    return now.bytes_total


def _holes(fd: int, path: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most 2 MiB that are not in the page cache, as far as samples tell."""
    facts = probe_file(fd, path, start, end - start)
    if facts.resident_bytes >= end - start:
        return
    if end - start <= _PIECE_BYTES:
        yield start, end - start
        return
    middle = (start + end) // 2 // _PIECE_BYTES * _PIECE_BYTES
    if middle <= start:
        middle += _PIECE_BYTES
    yield from _holes(fd, path, start, middle)
    yield from _holes(fd, path, middle, end)

"""Views of files in the page cache: nothing is copied, and what they lack there is brought in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllmctl.core.host import available_memory_bytes
from sllmctl.core.progress import ProgressFn
from sllmctl.native import Extent, Job, Memory, probe_file

if TYPE_CHECKING:
    from sllmctl.core.checkpoint import Shard
    from sllmctl.core.load import LoadOptions

log = logging.getLogger(__name__)

_MOSTLY = 3 / 4
"""With so much in the page cache, reading the rest into it takes less time than copying it all."""
_PIECE_BYTES = 2 << 20
"""A huge page. In more at once a thread waits for one of them after the other."""
_LEAST_PIECES = 16
"""A shard of less is not worth a look at what its filesystem can do."""


@dataclass(frozen=True, slots=True)
class View:
    """A shard's data as the page cache has it; ``missing_bytes`` of that are not there yet."""

    shard: Shard
    fd: int
    memory: Memory
    missing_bytes: int

    @property
    def nbytes(self) -> int:
        """Of all its data."""
        return self.shard.size - self.shard.data_offset

    @property
    def mostly_there(self) -> bool:
        """Whether little is missing."""
        return self.missing_bytes <= (1 - _MOSTLY) * self.nbytes


def map_shard(shard: Shard, fd: int, options: LoadOptions) -> View | None:
    """A view of a shard's data where that is a fair bet: local, and in the page cache."""
    view = _map(shard, fd, options)
    if view is not None and view.missing_bytes and options.map_files != "always":
        return None
    return _told(view)


def _map(shard: Shard, fd: int, options: LoadOptions) -> View | None:
    """A view of a local shard, if anybody can tell how much of it is in the page cache."""
    nbytes = shard.size - shard.data_offset
    # What is verified is copied, or it might change afterwards; not for those who share it anyway.
    copied = options.map_files == "never" or (options.verify and options.map_files != "always")
    if copied or nbytes == 0:
        return None
    facts = probe_file(fd, str(shard.path), shard.data_offset, nbytes)
    if not facts.local or not (facts.residency_known or options.map_files == "always"):
        return None
    memory = Memory.map_file(fd, str(shard.path), shard.data_offset, nbytes)
    return View(shard, fd, memory, nbytes - facts.resident_bytes)


def _told(view: View | None) -> View | None:
    """The view, after a word of warning where it is needed."""
    if view is not None and not view.memory.writable:
        log.warning(
            "`%s` is mapped read-only, since this machine does not overcommit memory: "
            "do not write to its tensors, or load with --map never",
            view.shard.path,
        )
    return view


def map_shards(
    shards: Sequence[Shard], fds: Sequence[int], options: LoadOptions
) -> list[View | None]:
    """Views of the shards that are loaded that way, for `bring_in`.

    These are shards that the page cache has nearly whole, where there is room for the rest. Others
    are, too, where the filesystem has huge pages: the disk then writes straight into them, which
    takes less time than fresh memory, for that has to be cleared before.
    """
    views: list[View | None] = []
    huge: dict[int, bool] = {}
    for shard, fd in zip(shards, fds, strict=True):
        view = _map(shard, fd, options)
        if view is None or not view.missing_bytes:
            pass
        elif options.map_files == "always":
            # Page faults bring in what is used; digests use all of it.
            view = view if options.verify else View(shard, fd, view.memory, 0)
        elif view.mostly_there:
            view = view if view.missing_bytes <= available_memory_bytes() // 2 else None
        else:
            # Files that push each other out of memory would be read again and again.
            roomy = sum(other.size for other in shards) <= available_memory_bytes()
            filesystem = os.fstat(fd).st_dev
            if filesystem not in huge and roomy and view.nbytes >= _LEAST_PIECES * _PIECE_BYTES:
                huge[filesystem] = _has_huge_pages(view, options)
            fit = roomy and huge.get(filesystem) and view.memory.writable
            view = view if fit and view.memory.advise_huge() else None
        views.append(_told(view))
    return views


def _has_huge_pages(view: View, options: LoadOptions) -> bool:
    """Try it: bring in one piece, and look at what it lies in."""
    start = -(-view.shard.data_offset // _PIECE_BYTES) * _PIECE_BYTES
    for piece in range(start, start + _LEAST_PIECES // 2 * _PIECE_BYTES, _PIECE_BYTES):
        # Not one that lies in the page cache: it came there in another way.
        if not probe_file(view.fd, str(view.shard.path), piece, _PIECE_BYTES).resident_bytes:
            break
    else:
        return False
    if not view.memory.advise_huge():
        return False
    _bring([(view, piece, _PIECE_BYTES)], options)
    offset = piece - view.shard.data_offset
    return view.memory.huge_bytes(offset, _PIECE_BYTES) == _PIECE_BYTES


def bring_in(
    views: Sequence[View | None], options: LoadOptions, progress: ProgressFn | None = None
) -> int:
    """Read what views lack into the page cache, so that no tensor has to wait for the disk.

    Args:
        views: Those of `map_shards`.
        options: Of the load.
        progress: Called with stage ``read``.

    Returns:
        How many bytes that were.

    Raises:
        ReadError: The disk fails, or a file changed.
    """
    parts: list[tuple[View, int, int]] = []
    missing = 0
    for view in views:
        if view is None or not view.missing_bytes:
            continue
        start, path = view.shard.data_offset, str(view.shard.path)
        if view.mostly_there:
            holes = _holes(view.fd, path, start, view.shard.size)
            parts += [(view, offset, nbytes) for offset, nbytes in holes]
        else:
            parts.append((view, start, view.nbytes))
            missing += view.missing_bytes
    if parts:
        _bring(parts, options, progress)
    return missing + sum(nbytes for view, _, nbytes in parts if view.mostly_there)


def _bring(
    parts: Sequence[tuple[View, int, int]], options: LoadOptions, progress: ProgressFn | None = None
) -> None:
    """Bring in ranges of files, from an offset so many bytes."""
    files = list({view.fd: str(view.shard.path) for view, _, _ in parts}.items())
    number = {fd: index for index, (fd, _) in enumerate(files)}
    extents = [
        Extent(
            number[view.fd], offset, nbytes, view.memory.address + offset - view.shard.data_offset
        )
        for view, offset, nbytes in parts
    ]
    keep = [view.memory for view, _, _ in parts]
    with Job(
        files,
        extents,
        keep=keep,
        chunk_bytes=options.chunk_bytes or _PIECE_BYTES,
        threads=options.threads,
        mapped=True,
    ) as job:
        done = False
        while not done:
            done, now = job.wait()
            if progress is not None:
                progress("read", now.bytes_done, now.bytes_total)


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

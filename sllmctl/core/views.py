"""Views of files in the page cache: nothing is copied, and what they lack there is brought in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from sllmctl.core.host import available_memory_bytes
from sllmctl.core.progress import BytesFn
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
_LOOKS = 4
_LOOKS_IN_VAIN = 3
_TURN_BYTES = 16 << 20
"""What one of several processes reads ahead at a time."""


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
    def filesystem(self) -> int:
        """A number of the filesystem that its file is on."""
        return os.fstat(self.fd).st_dev

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
    memory.advise_huge()  # for what is missing; what is there stays as it is
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
    """Views of the shards that are loaded that way, for `missing_parts`.

    These are shards that the page cache has nearly whole, where there is room for the rest. Others
    are, too, where the filesystem has huge pages: the disk then writes straight into them, which
    takes less time than fresh memory, for that has to be cleared before.
    """
    views = [_map(shard, fd, options) for shard, fd in zip(shards, fds, strict=True)]
    huge = _huge_filesystems([view for view in views if view is not None], options)

    def choose(view: View) -> View | None:
        if options.map_files == "always" and not options.verify:
            # Page faults bring in what is used; digests use all of it.
            return replace(view, missing_bytes=0)
        if options.map_files == "always" or not view.missing_bytes:
            return view
        if view.mostly_there:
            return view if view.missing_bytes <= available_memory_bytes() // 2 else None
        return view if view.filesystem in huge and view.memory.writable else None

    return [None if view is None else _told(choose(view)) for view in views]


def _huge_filesystems(views: Sequence[View], options: LoadOptions) -> set[int]:
    """Those whose files may be brought in in huge pages, of the views that lack much."""
    found: set[int] = set()
    lacking = [view for view in views if not view.mostly_there]
    if not lacking or options.map_files == "always":
        return found
    # Files that push each other, or those of other processes, out of memory would be read again
    # and again.
    room = available_memory_bytes(mapped=False)
    if sum(view.missing_bytes for view in views) > room:
        return found
    asked: set[int] = set()
    for view in sorted(lacking, key=lambda view: -view.nbytes):
        if view.filesystem not in asked and view.nbytes >= _LEAST_PIECES * _PIECE_BYTES:
            asked.add(view.filesystem)
            if _has_huge_pages(view, options):
                found.add(view.filesystem)
    return found


def _has_huge_pages(view: View, options: LoadOptions) -> bool:
    """Look at what pieces lie in: some that are there, or else a few that have to be brought in."""
    if view.memory.huge_bytes(0, _PIECE_BYTES) is None:
        return False  # nobody could tell
    path, start, end = str(view.shard.path), view.shard.data_offset, view.shard.size
    first = -(-start // _PIECE_BYTES)
    # Apart from each other, so that what the kernel reads along with one is none of the others.
    apart = (end // _PIECE_BYTES - first) // _LOOKS
    spread = ((first + number * apart) * _PIECE_BYTES for number in range(_LOOKS))
    holes = (at for at, nbytes in _holes(view.fd, path, start, end) if nbytes == _PIECE_BYTES)
    in_vain: list[int] = []
    for at in chain(spread, holes):
        missing = probe_file(view.fd, path, at, _PIECE_BYTES).resident_bytes == 0
        piece = View(
            replace(view.shard, data_offset=at),
            view.fd,
            Memory.map_file(view.fd, path, at, _PIECE_BYTES),
            _PIECE_BYTES,
        )
        piece.memory.advise_huge()
        bring_in([Part(piece, at, _PIECE_BYTES, 0)], options)
        if piece.memory.huge_bytes(0, _PIECE_BYTES) == _PIECE_BYTES:
            return True
        if missing:  # one page that was there already is enough for small ones
            in_vain.append(at)
        if len(in_vain) == _LOOKS_IN_VAIN:
            break
    del piece
    for at in in_vain:
        # The kernel read as much again. What is read directly later leaves nothing behind, either.
        os.posix_fadvise(view.fd, at, 2 * _PIECE_BYTES, os.POSIX_FADV_DONTNEED)
    return False


class Part(NamedTuple):
    """A range of a view's file that is to be brought in: so many bytes from an offset on.

    ``missing_bytes`` of them are not in the page cache, as far as samples tell.
    """

    view: View
    offset: int
    nbytes: int
    missing_bytes: int


def missing_parts(views: Iterable[View | None]) -> list[Part]:
    """What views lack: holes, or the whole of a view that lacks much."""
    parts: list[Part] = []
    for view in views:
        if view is None or not view.missing_bytes:
            continue
        start, end = view.shard.data_offset, view.shard.size
        if view.mostly_there:
            holes = _holes(view.fd, str(view.shard.path), start, end)
            parts += [Part(view, offset, nbytes, nbytes) for offset, nbytes in holes]
        else:
            parts.append(Part(view, start, view.nbytes, view.missing_bytes))
    return parts


def bring_in(parts: Sequence[Part], options: LoadOptions, done: BytesFn | None = None) -> None:
    """Read parts into the page cache and their views, so that no tensor waits for the disk.

    Raises:
        ReadError: The disk fails, or a file changed.
    """
    files = list({part.view.fd: str(part.view.shard.path) for part in parts}.items())
    number = {fd: index for index, (fd, _) in enumerate(files)}
    extents = [
        Extent(
            number[view.fd], offset, nbytes, view.memory.address + offset - view.shard.data_offset
        )
        for view, offset, nbytes, _ in parts
    ]
    with Job(
        files,
        extents,
        keep=[part.view.memory for part in parts],
        chunk_bytes=options.chunk_bytes or _PIECE_BYTES,
        threads=options.threads,
        mapped=True,
    ) as job:
        ended = False
        while not ended:
            ended, now = job.wait()
            if done is not None:
                done(now.bytes_done)


def read_ahead(shard: Shard, fd: int, options: LoadOptions, turn: int, turns: int) -> None:
    """Bring a part of a file into the page cache: every so-many-th 16 MiB, by turns.

    Raises:
        SllmError: The disk fails, or a file changed.
    """
    view = _map(shard, fd, options)
    if view is not None and view.missing_bytes:
        spans = range(shard.data_offset + turn * _TURN_BYTES, shard.size, turns * _TURN_BYTES)
        parts = [Part(view, at, min(_TURN_BYTES, shard.size - at), 0) for at in spans]
        if parts:
            bring_in(parts, options)


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

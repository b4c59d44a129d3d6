"""Write shards: pieces of sources into chunks, each digested on its way to the disk."""

from __future__ import annotations

import bisect
import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import xxhash

from sllmctl.core.fileio import Buffer, errno_text
from sllmctl.core.manifest import CHUNK_BYTES, DIGEST_BYTES, ShardDigest, shard_digest
from sllmctl.core.oscalls import preallocate, start_writeback
from sllmctl.core.progress import ProgressFn
from sllmctl.core.workers import Task, run_tasks
from sllmctl.core.write.layout import ShardLayout
from sllmctl.errors import CheckpointError

THREADS = 4


class ByteSource(Protocol):
    """Where bytes come from. Any thread may read."""

    def read_into(self, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        """Fill ``nbytes`` of a buffer from ``position`` on with the bytes at ``offset``.

        Up to a page behind them may be overwritten.
        """


@dataclass(frozen=True, slots=True)
class MemoryBytes:
    """A source that is in memory already."""

    data: bytes

    def read_into(self, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        """Fill ``nbytes`` of a buffer from ``position`` on with the bytes at ``offset``."""
        buffer.view[position : position + nbytes] = self.data[offset : offset + nbytes]


@dataclass(frozen=True, slots=True)
class ZeroBytes:
    """Padding."""

    def read_into(self, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        """Fill ``nbytes`` of a buffer from ``position`` on with zeros."""
        ctypes.memset(buffer.address + position, 0, nbytes)


class Piece(NamedTuple):
    """A run of bytes of a file to be written, and where they come from."""

    position: int
    nbytes: int
    source: ByteSource
    offset: int


def plan_pieces(layout: ShardLayout, sources: Mapping[str, tuple[ByteSource, int]]) -> list[Piece]:
    """List what makes up a shard, in file order; neighbours in one source become one piece.

    What lies between tensors, and behind the last, becomes zero.

    Args:
        layout: The shard.
        sources: For each tensor, the source of its bytes and the offset of the first.
    """
    pieces = [Piece(0, len(layout.header), MemoryBytes(layout.header), 0)]
    end = len(layout.header)
    for entry in layout.entries:
        if entry.nbytes == 0:
            continue
        if entry.offset > end:
            pieces.append(Piece(end, entry.offset - end, ZeroBytes(), 0))
        end = entry.offset + entry.nbytes
        source, offset = sources[entry.name]
        last = pieces[-1]
        if last.source is source and last.offset + last.nbytes == offset:
            pieces[-1] = last._replace(nbytes=last.nbytes + entry.nbytes)
        else:
            pieces.append(Piece(entry.offset, entry.nbytes, source, offset))
    if layout.size > end:
        pieces.append(Piece(end, layout.size - end, ZeroBytes(), 0))
    return pieces


def write_shards(
    shards: Sequence[tuple[ShardLayout, Sequence[Piece]]],
    directory: Path,
    *,
    on_written: Callable[[ShardDigest], None],
    total_bytes: int,
    done_bytes: int = 0,
    progress: ProgressFn | None = None,
    at_end: Callable[[], None] | None = None,
) -> None:
    """Write shards and make each durable.

    Args:
        shards: Layouts, and the pieces of each in file order.
        directory: Where to; files there are replaced.
        on_written: Called once a shard, when it is on disk, by one thread at a time.
        total_bytes: For progress.
        done_bytes: For progress: where it starts.
        progress: Called with stage ``convert``.
        at_end: Called once when no source is read any more, after a failure too.

    Raises:
        CheckpointError: The disk is full, or fails.
        SllmError: What a source raises.
    """
    opened: list[_ShardFile] = []
    lock = threading.Lock()

    def tasks() -> Iterator[Task]:
        for layout, pieces in shards:
            shard = _ShardFile(directory / layout.name, layout.size, pieces, on_written, lock)
            opened.append(shard)
            for index in range(shard.chunks):
                yield shard.task(index)

    def close() -> None:
        for shard in opened:
            shard.close()
        if at_end is not None:
            at_end()

    run_tasks(
        tasks(),
        threads=THREADS,
        stage="convert",
        total_bytes=total_bytes,
        done_bytes=done_bytes,
        progress=progress,
        at_end=close,
    )


class _ShardFile:
    """A shard that is being written, a chunk at a time, by several threads."""

    def __init__(
        self,
        path: Path,
        size: int,
        pieces: Sequence[Piece],
        on_written: Callable[[ShardDigest], None],
        lock: threading.Lock,
    ) -> None:
        self._path = path
        self._size = size
        self._pieces = pieces
        self._ends = [piece.position + piece.nbytes for piece in pieces]
        self._on_written = on_written
        self._lock = lock
        self.chunks = -(-size // CHUNK_BYTES)
        self._left = self.chunks
        self._digests = bytearray(self.chunks * DIGEST_BYTES)
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as exc:
            raise write_error(path, 0, exc) from exc
        try:
            preallocate(self._file.fileno(), size)
        except OSError as exc:
            self._file.close()
            raise write_error(path, 0, exc) from exc

    def task(self, index: int) -> Task:
        return lambda buffer: self._write_chunk(index, buffer)

    def _write_chunk(self, index: int, buffer: Buffer) -> int:
        start = index * CHUNK_BYTES
        end = min(start + CHUNK_BYTES, self._size)
        for number in range(bisect.bisect_right(self._ends, start), len(self._pieces)):
            piece = self._pieces[number]
            if piece.position >= end:
                break
            first = max(piece.position, start)
            nbytes = min(piece.position + piece.nbytes, end) - first
            piece.source.read_into(
                piece.offset + first - piece.position, buffer, first - start, nbytes
            )
        chunk = buffer.view[: end - start]
        digest = xxhash.xxh3_128_digest(chunk)
        write_all(self._file.fileno(), chunk, start, self._path)
        # The disk works while the next chunks are read; the final sync then finds little to do.
        start_writeback(self._file.fileno(), start, end - start)
        with self._lock:
            self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = digest
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()
        return end - start

    def _finish(self) -> None:
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as exc:
            raise write_error(self._path, self._size, exc) from exc
        digests = bytes(self._digests)
        with self._lock:
            self._on_written(
                ShardDigest(self._path.name, self._size, shard_digest(digests), digests.hex())
            )

    def close(self) -> None:
        """Close the file. No chunk may be under way."""
        self._file.close()


def write_all(fd: int, data: memoryview, offset: int, path: Path) -> None:
    """Write a whole range.

    Raises:
        CheckpointError: The disk is full, or fails; the message names file and offset.
    """
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as exc:
            raise write_error(path, offset + done, exc) from exc


def write_error(path: Path, offset: int, exc: OSError) -> CheckpointError:
    """Name the file and the byte that could not be written."""
    return CheckpointError(f"cannot write `{path}` at byte {offset}: {errno_text(exc)}")

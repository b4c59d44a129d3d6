"""Digest files chunk by chunk, with a few threads and bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import xxhash

from sllmctl.core.fileio import Buffer, SourceFile
from sllmctl.core.progress import ProgressFn
from sllmctl.core.workers import Task, run_tasks
from sllmctl.errors import ReadError

THREADS = 2

OnChunk = Callable[[int, int, bytes], None]
"""Told ``(file, chunk, digest)``: indexes from 0, and 16 bytes. Called by several threads."""

OnUnreadable = Callable[[int, int, ReadError], None]
"""Told ``(file, chunk, error)`` about a chunk that cannot be read."""


def scan_files(
    files: Sequence[tuple[Path, int]],
    *,
    chunk_bytes: int,
    bypass_cache: bool,
    on_chunk: OnChunk,
    on_unreadable: OnUnreadable | None = None,
    progress: ProgressFn | None = None,
) -> None:
    """Read files and digest each chunk with XXH3-128.

    Args:
        files: Path, and how many bytes of it to read.
        chunk_bytes: Chunks start at its multiples; the last of a file may be shorter.
        bypass_cache: Read what is on the disk even where the page cache holds it.
        on_chunk: Receives the digests.
        on_unreadable: Receives read errors; without it the first is raised.
        progress: Called with stage ``verify``.

    Raises:
        ReadError: A file cannot be opened, or a chunk cannot be read.
    """
    opened: list[SourceFile] = []

    def task(number: int, source: SourceFile, index: int, nbytes: int) -> Task:
        def run(buffer: Buffer) -> int:
            try:
                source.read_into(index * chunk_bytes, buffer, 0, nbytes)
            except ReadError as exc:
                if on_unreadable is None:
                    raise
                on_unreadable(number, index, exc)
            else:
                on_chunk(number, index, xxhash.xxh3_128_digest(buffer.view[:nbytes]))
            return nbytes

        return run

    def tasks() -> Iterator[Task]:
        for number, (path, size) in enumerate(files):
            source = SourceFile(path, bypass_cache=bypass_cache)
            opened.append(source)
            for index, start in enumerate(range(0, size, chunk_bytes)):
                yield task(number, source, index, min(chunk_bytes, size - start))

    def close() -> None:
        for source in opened:
            source.close()

    run_tasks(
        tasks(),
        threads=THREADS,
        stage="verify",
        total_bytes=sum(size for _, size in files),
        buffer_bytes=chunk_bytes,
        progress=progress,
        at_end=close,
    )

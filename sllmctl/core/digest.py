"""Compare a checkpoint with its digests while it is loaded, chunk by chunk as the bytes arrive."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from sllmctl.core.checkpoint import Checkpoint, Shard
from sllmctl.core.manifest import ShardDigest
from sllmctl.errors import CheckpointError, ChecksumMismatch
from sllmctl.native import Memory

_THREADS = 2

Reader = Callable[[int, int], Iterable[memoryview]]
"""Gives the bytes of a shard's tensors from a first to before a last one, in order."""


def memory_reader(memory: Memory, memory_offset: int) -> Reader:
    """Read a shard that is in memory, whose first byte is that of the file at an offset."""
    return lambda start, end: [
        memoryview(memory.buffer)[start - memory_offset : end - memory_offset]
    ]


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """What one shard's bytes must be, and how to get at what a load made of them.

    Attributes:
        read: Gives the bytes of its tensors.
        fd: The open file, for its header.
        names: ``(offset in the file, name)`` of its tensors in file order, for messages.
    """

    shard: Shard
    digest: ShardDigest
    chunk_bytes: int
    read: Reader
    fd: int
    names: Sequence[tuple[int, str]]

    @property
    def data_chunks(self) -> range:
        """Digest chunks that hold tensor data. Those before hold nothing but the header."""
        return range(
            self.shard.data_offset // self.chunk_bytes, -(-self.shard.size // self.chunk_bytes)
        )

    def check(self, index: int) -> None:
        """Compare one chunk that has arrived.

        Raises:
            ChecksumMismatch: It differs.
        """
        start = index * self.chunk_bytes
        end = min(start + self.chunk_bytes, self.shard.size)
        data = self.shard.data_offset
        hasher = xxhash.xxh3_128()
        if start < data:
            hasher.update(os.pread(self.fd, min(end, data) - start, start))
        if end > data:
            for part in self.read(max(start, data), end):
                hasher.update(part)
        if hasher.digest() != self.digest.chunk_digest(index):
            raise ChecksumMismatch(
                f"`{self.shard.path}` is damaged between bytes {start} and {end}"
                f"{self._tensors_between(start, end)}",
                hint="run `sllmctl verify` to see all damage, then convert or copy it again",
            )

    def _tensors_between(self, start: int, end: int) -> str:
        inside = [name for at, name in self.names if start <= at < end]
        before = [name for at, name in self.names if at < start][-1:]
        hit = before + inside
        return f" (in `{hit[0]}`{f' to `{hit[-1]}`' if len(hit) > 1 else ''})" if hit else ""


def shard_checks(
    checkpoint: Checkpoint, fds: Sequence[int], readers: Sequence[Reader]
) -> list[ShardCheck]:
    """Pair every shard with the digests of the manifest.

    Args:
        checkpoint: Whose manifest is asked.
        fds: Of its shards.
        readers: How to get at the bytes of each shard's tensors.

    Raises:
        CheckpointError: The checkpoint has no digests, or none for one of its shards.
    """
    if checkpoint.manifest is None:
        raise CheckpointError(
            f"`{checkpoint.path}` has no digests to verify: it was not written by sllmctl",
            hint=f"run `sllmctl convert {checkpoint.path}`, or load without --verify",
        )
    digests = {digest.name: digest for digest in checkpoint.manifest.shards}
    names: list[list[tuple[int, str]]] = [[] for _ in checkpoint.shards]
    for entry in checkpoint.tensors.values():
        names[entry.shard].append((entry.offset, entry.name))
    checks = []
    for index, shard in enumerate(checkpoint.shards):
        digest = digests.get(shard.path.name)
        if digest is None or digest.size != shard.size:
            raise CheckpointError(
                f"`{shard.path}` has {shard.size} bytes, and the manifest knows "
                f"{f'one of {digest.size}' if digest else 'no such shard'}",
                hint="run `sllmctl verify` to see all that differs",
            )
        checks.append(
            ShardCheck(
                shard,
                digest,
                checkpoint.manifest.chunk_bytes,
                readers[index],
                fds[index],
                names[index],
            )
        )
    return checks


class Verification:
    """Checks chunks in the background, in the order in which a job puts them in their place.

    The job's chunks must be the digests' chunks, of the same shards in the same order.
    """

    def __init__(self, checks: Sequence[ShardCheck]) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "sllm-verify")
        self._waiting = {
            number: (check, index)
            for number, (check, index) in enumerate(
                (check, index) for check in checks for index in check.data_chunks
            )
        }
        self._count = len(self._waiting)
        self._results: list[Future[None]] = [
            self._pool.submit(check.check, index)
            for check in checks
            for index in range(check.data_chunks.start)
        ]

    @classmethod
    def of_all(cls, checks: Sequence[ShardCheck]) -> None:
        """Check what is in its place already, every chunk of it.

        Raises:
            ChecksumMismatch: A chunk is damaged.
        """
        with cls(checks) as verification:
            verification.take_up(lambda _, count: b"\1" * count)
            verification.finish()

    def take_up(self, chunks_done: Callable[[int, int], bytes]) -> None:
        """Start checking what has arrived since the last call.

        Raises:
            ChecksumMismatch: A chunk that was checked meanwhile is damaged.
        """
        done = chunks_done(0, self._count)
        for number in [number for number in self._waiting if done[number]]:
            check, index = self._waiting.pop(number)
            self._results.append(self._pool.submit(check.check, index))
        for result in [result for result in self._results if result.done()]:
            result.result()
            self._results.remove(result)

    def finish(self) -> None:
        """Wait for every check. Call it when the job has ended.

        Raises:
            ChecksumMismatch: A chunk is damaged.
        """
        for result in self._results:
            result.result()

    def __enter__(self) -> Verification:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

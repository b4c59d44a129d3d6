"""Walk through a checkpoint's tensors in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sllmctl.core.checkpoint import Checkpoint, Shard, TensorEntry
from sllmctl.core.load import (
    LoadOptions,
    check_memory,
    check_stamp,
    open_shard,
    stamp_of,
)
from sllmctl.core.tensors import TensorBuilder
from sllmctl.core.views import map_shard
from sllmctl.errors import ConfigError
from sllmctl.native import Extent, Job, Memory

if TYPE_CHECKING:
    import torch

WINDOW_BYTES = 256 * 2**20


class Views(Protocol):
    """Memory of whole shards, in which bytes appear without being read here."""

    def may_hold(self, shard: int, start: int, end: int) -> bool:
        """Whether a range of a shard is there, or may come."""

    def wait(self, shard: int, start: int, end: int) -> Memory | None:
        """The memory of the shard, once it holds a range; None if it never will."""


def stream(
    checkpoint: Checkpoint,
    options: LoadOptions,
    *,
    views: Callable[[Sequence[int]], Views | None] | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` in file order, reading one window ahead of the consumer.

    Two windows are in memory at a time, and whatever the consumer keeps; a tensor larger than a
    window is one of its own. An alias follows the tensor whose bytes it shares, as the same object.

    Args:
        checkpoint: Whose tensors.
        options: How to read.
        views: Given the open shards, returns where to look before reading.
        window_bytes: Size of a window.

    Raises:
        ConfigError: ``verify``: digests are of whole chunks.
        ReadError, CheckpointError, HostMemoryError: as ``load`` raises them.
    """
    if options.verify:
        raise ConfigError("a stream cannot verify", hint="run `sllmctl verify` first")
    builder = TensorBuilder(checkpoint)
    aliases: dict[str, list[str]] = {}
    for alias, kept in checkpoint.aliases.items():
        aliases.setdefault(kept, []).append(alias)
    with ExitStack() as stack:
        files = _Files(checkpoint, options, views, stack)
        ahead: _Window | None = None
        for entries in [*windows_of(checkpoint, window_bytes), []]:
            ready, ahead = ahead, _Window(entries, files, stack) if entries else None
            if ready is None:
                continue
            # From here on the tensors alone keep the window's memory.
            tensors = ready.finish(builder)
            del ready
            while tensors:
                name = next(iter(tensors))
                tensor = tensors.pop(name)
                yield name, tensor
                for alias in aliases.get(name, ()):
                    yield alias, tensor
                del tensor


def windows_of(checkpoint: Checkpoint, window_bytes: int) -> Iterator[list[TensorEntry]]:
    """Neighbouring tensors of one shard that are read together, in file order."""
    entries: list[TensorEntry] = []
    for entry in checkpoint.tensors.values():
        if entries and (
            entry.shard != entries[0].shard
            or entry.offset + entry.nbytes - entries[0].offset > window_bytes
        ):
            yield entries
            entries = []
        entries.append(entry)
    if entries:
        yield entries


@dataclass(frozen=True, slots=True)
class _OpenShard:
    shard: Shard
    fd: int
    stamp: tuple[int, int]
    view: Memory | None


class _Files:
    """All shards, opened at once: a checkpoint that is replaced meanwhile is read to its end."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: LoadOptions,
        views: Callable[[Sequence[int]], Views | None] | None,
        stack: ExitStack,
    ) -> None:
        self.options = options
        self._shards = [(shard, open_shard(shard, stack)) for shard in checkpoint.shards]
        self.views = views([fd for _, fd in self._shards]) if views is not None else None
        self._last: tuple[int, _OpenShard] | None = None

    def open(self, index: int) -> _OpenShard:
        if self._last is None or self._last[0] != index:
            shard, fd = self._shards[index]
            view = map_shard(shard, fd, self.options) if self.views is None else None
            memory = view.memory if view else None
            self._last = index, _OpenShard(shard, fd, stamp_of(fd), memory)
        return self._last[1]


class _Window:
    """Tensors on their way: a view that is there or may come, or a job that reads them."""

    def __init__(self, entries: list[TensorEntry], files: _Files, stack: ExitStack) -> None:
        self._entries, self._files, self._stack = entries, files, stack
        self._opened = files.open(entries[0].shard)
        self._range = entries[0].offset, entries[-1].offset + entries[-1].nbytes
        self._memory = self._opened.view
        self._start = self._opened.shard.data_offset
        self._job: Job | None = None
        views = files.views
        if self._memory is None and not (
            views is not None and views.may_hold(entries[0].shard, *self._range)
        ):
            self._memory = self._begin()

    def _begin(self) -> Memory:
        """Begin to read."""
        self._start, end = self._range
        nbytes = end - self._start
        check_memory(nbytes)
        memory = Memory.create(max(nbytes, 1), self._start)
        if nbytes:
            self._job = Job(
                [(self._opened.fd, str(self._opened.shard.path))],
                [Extent(0, self._start, nbytes, memory.address)],
                keep=memory,
                chunk_bytes=self._files.options.chunk_bytes,
                threads=self._files.options.threads,
            )
            # Before the descriptor is closed, when the consumer stops early.
            self._stack.callback(self._job.close)
        return memory

    def finish(self, builder: TensorBuilder) -> dict[str, torch.Tensor]:
        """Wait for the bytes, and make the tensors."""
        shard, memory = self._entries[0].shard, self._memory
        if memory is None and self._files.views is not None:
            memory, self._start = self._files.views.wait(shard, *self._range), 0
        if memory is None:
            memory = self._begin()
        if self._job is not None:
            while not self._job.wait()[0]:
                pass
            self._job.close()
        check_stamp(self._opened.shard, self._opened.fd, self._opened.stamp)
        place = (memory, self._start)
        return builder.build(self._entries, [place] * (shard + 1))

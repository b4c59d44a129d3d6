"""Walk through a checkpoint's tensors on a device, in bounded memory of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sllmctl.core.checkpoint import Checkpoint, TensorEntry
from sllmctl.core.device_load import DeviceLoad, Span, file_span
from sllmctl.core.devices import DeviceSpec
from sllmctl.core.load import LoadOptions, check_stamp, open_shard, stamp_of
from sllmctl.core.slabs import plan_slabs
from sllmctl.core.stream import WINDOW_BYTES, windows_of
from sllmctl.errors import ConfigError, NativeError

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """Where the bytes of a checkpoint come from, asked in file order."""

    def spans(self, shard: int, start: int, end: int) -> Sequence[Span]:
        """Where a shard's bytes are, from a first to before a last one; may wait for them."""

    def interrupt(self) -> None:
        """End a wait in `spans`, from another thread; nothing is asked afterwards."""

    def close(self) -> None:
        """Let everything go."""


SourceFn = Callable[[Sequence[int]], Source]
"""Opens a source, given the open shards."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """The checkpoint's own files, open."""

    checkpoint: Checkpoint
    fds: Sequence[int]

    def spans(self, shard: int, start: int, end: int) -> Sequence[Span]:
        """All of it is in the shard's file."""
        return [file_span(shard, self.checkpoint.shards[shard], self.fds[shard], start, end)]

    def interrupt(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """The files are whose they were."""


def stream_to_device(
    checkpoint: Checkpoint,
    spec: DeviceSpec,
    options: LoadOptions,
    *,
    source: SourceFn | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` in file order, reading one window ahead of the consumer.

    Memory is torch's, of the thread that asks for the next tensor. Two windows are on the device at
    a time, and those of which the consumer keeps a tensor; one larger than a window is one of its
    own. An alias follows the tensor whose bytes it shares, as the same object.

    Args:
        checkpoint: Whose tensors.
        spec: The device, which is there.
        options: Threads and chunks of the reads.
        source: Where bytes come from; the files, where not given.
        window_bytes: Size of a window.

    Raises:
        ConfigError: ``verify``: digests are of whole chunks.
        ReadError, CheckpointError, DeviceError: as `DeviceLoad` raises them.
    """
    if options.verify:
        raise ConfigError("a stream cannot verify", hint="run `sllmctl verify` first")
    placement = dict.fromkeys([*checkpoint.tensors, *checkpoint.aliases], spec)
    windows = list(windows_of(checkpoint, window_bytes))
    # All of one size: torch keeps what is freed, and uses it again only for what fits.
    slab_bytes = max((_slab_bytes(w) for w in windows if _span_bytes(w) <= window_bytes), default=0)
    stop = threading.Event()
    with ExitStack() as stack:
        fds = [open_shard(shard, stack) for shard in checkpoint.shards]
        stamps = [stamp_of(fd) for fd in fds]
        origin = source(fds) if source else FileSource(checkpoint, fds)
        stack.callback(origin.close)
        pool = stack.enter_context(ThreadPoolExecutor(1, "sllm-stream"))
        # The other way round when it ends: the thread first, then what it reads from.
        stack.callback(origin.interrupt)
        stack.callback(stop.set)

        def start(entries: Sequence[TensorEntry]) -> tuple[DeviceLoad, Future[None]]:
            load = DeviceLoad(
                checkpoint, placement, options, entries=entries, slab_bytes=slab_bytes
            )
            return load, pool.submit(_fill, load, entries, origin, stop)

        ahead: tuple[DeviceLoad, Future[None]] | None = None
        before: Sequence[TensorEntry] = ()
        for entries in [*windows, []]:
            ready, ahead = ahead, start(entries) if entries else None
            shard, before = before[0].shard if before else 0, entries
            if ready is None:
                continue
            ready[1].result()
            check_stamp(checkpoint.shards[shard], fds[shard], stamps[shard])
            tensors = ready[0].build()
            del ready  # from here on the tensors alone keep the window's memory
            while tensors:
                yield (name := next(iter(tensors))), tensors.pop(name)


def _fill(
    load: DeviceLoad, entries: Sequence[TensorEntry], source: Source, stop: threading.Event
) -> None:
    def watch(_: int) -> None:
        if stop.is_set():
            raise NativeError("the stream was left")

    shard, start = entries[0].shard, entries[0].offset
    watch(0)
    load.read(source.spans(shard, start, max(e.offset + e.nbytes for e in entries)), watch)


def _span_bytes(entries: Sequence[TensorEntry]) -> int:
    return entries[-1].offset + entries[-1].nbytes - entries[0].offset


def _slab_bytes(entries: Sequence[TensorEntry]) -> int:
    return max(plan_slabs([entry.nbytes for entry in entries])[1], default=0)

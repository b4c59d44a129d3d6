"""Load a checkpoint onto devices: slabs of torch's memory, filled through pinned staging memory."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from sllmctl.core.checkpoint import Checkpoint, Shard, TensorEntry
from sllmctl.core.devices import DeviceSpec, wait_for_torch
from sllmctl.core.digest import Reader, shard_checks
from sllmctl.core.dtypes import torch_shape
from sllmctl.core.header import collector_paused
from sllmctl.core.load import Loaded, LoadOptions, LoadStats, check_stamp, open_shard, stamp_of
from sllmctl.core.placement import Placement
from sllmctl.core.progress import BytesFn, ProgressFn, report
from sllmctl.core.rings import CHUNK_BYTES, READERS, borrow_ring, open_device
from sllmctl.core.slabs import Slabs
from sllmctl.core.tensors import tensor_dtypes
from sllmctl.errors import ChecksumMismatch
from sllmctl.native import Extent, Job, Progress

if TYPE_CHECKING:
    import torch

FillFn = Callable[[Sequence[int], LoadStats], None]
"""Brings every byte to its place, given open shards, and adds what it did to the statistics."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``start`` to ``end`` of a shard, which lie at ``offset`` of a descriptor."""

    shard: int
    start: int
    end: int
    fd: int
    path: str
    offset: int


class _Target(NamedTuple):
    """A tensor's place on one device: numbers of the device, and of the tensor in its slabs."""

    device: int
    number: int


class _Piece(NamedTuple):
    """Bytes of a tensor on a device: number of the device, its slab, first byte and one past it."""

    device: int
    slab: int
    first: int
    last: int


class DeviceLoad:
    """Tensors on their way to devices.

    Made on the thread that will use the tensors: torch allocates their memory here, for that
    thread's current streams. Everything else may be called on another.

    Args:
        checkpoint: Whose tensors.
        placement: A device for every name, as `DeviceMap.place` chooses it.
        options: Threads and chunks of the reads.
        entries: Which of the tensors, in file order; all where not given.
        slab_bytes: The least size of the pieces in which devices give memory.

    Raises:
        DeviceError: A device has no room, or its runtime refuses.
        DeviceUnavailable: A device is not there.
        CheckpointError: This torch lacks a dtype, or cannot pack the elements of a tensor.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        options: LoadOptions,
        *,
        entries: Sequence[TensorEntry] | None = None,
        slab_bytes: int = 0,
    ) -> None:
        self._entries = list(checkpoint.tensors.values()) if entries is None else entries
        self._strides = checkpoint.strides
        self._placement = placement
        self._readers = options.threads or READERS
        self._chunk_bytes = options.chunk_bytes or CHUNK_BYTES
        self._dtypes = tensor_dtypes(self._entries)
        self._aliases: dict[str, list[str]] = {}
        for alias, kept in checkpoint.aliases.items():
            self._aliases.setdefault(kept, []).append(alias)
        with collector_paused():
            self.specs, sizes = self._assign()
            self._slabs = [
                Slabs(spec, one, slab_bytes=slab_bytes)
                for spec, one in zip(self.specs, sizes, strict=True)
            ]
        self.nbytes = sum(map(sum, sizes))
        """What moves; more than the tensors have where one is wanted on two devices."""
        # The host's own staging memory is not pinned, and feeds nothing but the host.
        self._pinning = max(
            self.specs, key=lambda spec: spec.kind != "cpu", default=DeviceSpec("cpu")
        )
        self._devices = [open_device(spec) for spec in self.specs]
        self._ends = [entry.offset + entry.nbytes for entry in self._entries]
        shards = [entry.shard for entry in self._entries]
        self._by_shard = {
            shard: range(bisect_left(shards, shard), bisect_right(shards, shard))
            for shard in set(shards)
        }
        for spec in self.specs:
            # Torch hands out memory that work in its streams may still use; ours wait for none.
            wait_for_torch(spec)

    def _assign(self) -> tuple[list[DeviceSpec], list[list[int]]]:
        """Give every tensor a number on each device that wants it.

        Returns:
            The devices, and for each the sizes of its tensors in bytes, by number.
        """
        numbers: dict[DeviceSpec, int] = {}
        sizes: list[list[int]] = []
        self._targets: list[list[_Target]] = []
        for entry in self._entries:
            targets: list[_Target] = []
            for name in (entry.name, *self._aliases.get(entry.name, ())):
                device = numbers.setdefault(self._placement[name], len(numbers))
                if device == len(sizes):
                    sizes.append([])
                if all(target.device != device for target in targets):
                    targets.append(_Target(device, len(sizes[device])))
                    sizes[device].append(entry.nbytes)
            self._targets.append(targets)
        return list(numbers), sizes

    def read(self, spans: Iterable[Span], done: BytesFn | None = None) -> Progress | None:
        """Bring what of the tensors lies in some spans to the devices, each byte read once.

        Args:
            spans: Disjoint; their descriptors stay open meanwhile.
            done: Told how many bytes of this call are in their place.

        Returns:
            How it went; None where nothing was to be done.

        Raises:
            ReadError: A file cannot be read, is too short, or changed meanwhile.
            DeviceError: The runtime of a device failed.
            NativeError: Nothing moved for a minute.
        """
        files: dict[tuple[int, str], int] = {}
        extents: list[Extent] = []
        for span in spans:
            extents += self._extents(span, files.setdefault((span.fd, span.path), len(files)))
        if not extents:
            return None
        chunk_bytes = self._chunk_bytes
        # Neighbours are read together.
        chunks = len(files) + sum(extent.nbytes for extent in extents) // chunk_bytes
        with (
            borrow_ring(
                self._pinning, chunk_bytes=chunk_bytes, chunks=chunks, readers=self._readers
            ) as ring,
            Job(
                list(files),
                extents,
                keep=self._slabs,
                chunk_bytes=chunk_bytes,
                threads=self._readers,
                devices=self._devices,
                ring=ring,
            ) as job,
        ):
            ended = False
            while not ended:
                ended, now = job.wait()
                if done is not None:
                    done(now.bytes_done)
        return now

    def _extents(self, span: Span, file: int) -> Iterator[Extent]:
        for position in self._positions(span.shard, span.start):
            entry = self._entries[position]
            if entry.offset >= span.end:
                break
            start = max(entry.offset, span.start)
            nbytes = min(self._ends[position], span.end) - start
            for device, number in self._targets[position] if nbytes > 0 else ():
                yield Extent(
                    file,
                    span.offset + start - span.start,
                    nbytes,
                    self._slabs[device].address(number) + start - entry.offset,
                    device,
                )

    def _positions(self, shard: int, start: int) -> range:
        """Numbers of the tensors of a shard that end past a byte."""
        here = self._by_shard.get(shard, range(0))
        return range(bisect_right(self._ends, start, here.start, here.stop), here.stop)

    def build(self) -> dict[str, torch.Tensor]:
        """Make the tensors, once every byte is in its place; an alias follows what it shares.

        Names of the same bytes are the same object where they are on the same device.
        """
        tensors: dict[str, torch.Tensor] = {}
        with collector_paused():
            for entry, targets in zip(self._entries, self._targets, strict=True):
                dtype, shape = self._dtypes[entry.dtype], torch_shape(entry.dtype, entry.shape)
                strides = self._strides.get(entry.name)
                made = {
                    device: self._slabs[device].tensor(number, entry.nbytes, dtype, shape, strides)
                    for device, number in targets
                }
                tensors[entry.name] = made[targets[0].device]
                for alias in self._aliases.get(entry.name, ()):
                    tensors[alias] = made[self.specs.index(self._placement[alias])]
        return tensors

    def readers(self, shards: int) -> list[Reader]:
        """For each shard: how to get the bytes of its tensors back from the devices."""
        return [partial(self._fetch, shard) for shard in range(shards)]

    def _fetch(self, shard: int, start: int, end: int) -> Iterator[memoryview]:
        """Bytes of a shard; what its tensors leave free is zero.

        What lies side by side in a slab comes in one copy.

        Raises:
            ChecksumMismatch: A tensor on two devices is not the same on both.
        """
        group: list[_Piece] = []
        at = start
        for position in self._positions(shard, start):
            entry = self._entries[position]
            if entry.offset >= end:
                break
            first, last = max(start, entry.offset), min(end, self._ends[position])
            if first >= last:
                continue
            piece, *copies = [
                self._piece(target, first - entry.offset, last - first)
                for target in self._targets[position]
            ]
            for copy in copies:
                if self._copy_back(copy) != self._copy_back(piece):
                    raise ChecksumMismatch(
                        f"`{entry.name}` is not the same on {self.specs[copy.device]} as on "
                        f"{self.specs[piece.device]}",
                        hint="a device or its link is faulty: see `sllmctl doctor`",
                    )
            if group and (piece[:2] != group[0][:2] or first > at):
                yield from self._copy_together(group)
                group = []
            if first > at:
                yield memoryview(bytes(first - at))
            at = last
            group.append(piece)
        yield from self._copy_together(group)
        if end > at:
            yield memoryview(bytes(end - at))

    def _piece(self, target: _Target, offset: int, nbytes: int) -> _Piece:
        slab, start = self._slabs[target.device].places[target.number]
        return _Piece(target.device, slab, start + offset, start + offset + nbytes)

    def _copy_back(self, piece: _Piece) -> memoryview:
        return self._slabs[piece.device].fetch(piece.slab, piece.first, piece.last)

    def _copy_together(self, group: Sequence[_Piece]) -> Iterator[memoryview]:
        if group:
            base = group[0].first
            host = self._copy_back(group[0]._replace(last=group[-1].last))
            for piece in group:
                yield host[piece.first - base : piece.last - base]


def complete(
    checkpoint: Checkpoint,
    load: DeviceLoad,
    options: LoadOptions,
    fill: FillFn,
    progress: ProgressFn | None = None,
) -> Loaded:
    """Fill what was prepared, verify it where asked, and make the tensors.

    Args:
        checkpoint: What is loaded.
        load: Its tensors.
        options: Whether to verify.
        fill: Brings the bytes, and tells its own progress.
        progress: Called with stage ``verify``.

    Raises:
        ReadError, ChecksumMismatch, CheckpointError: As ``core.load.load`` does.
        DeviceError: The runtime of a device failed.
    """
    started = time.perf_counter()
    stats = LoadStats(len(checkpoint.tensors) + len(checkpoint.aliases), checkpoint.nbytes)
    with ExitStack() as stack:
        fds = [open_shard(shard, stack) for shard in checkpoint.shards]
        stamps = [stamp_of(fd) for fd in fds]
        opened = time.perf_counter()
        fill(fds, stats)
        stats.read_s = time.perf_counter() - opened - stats.copy_s
        if options.verify:
            verifying = time.perf_counter()
            # The bytes come back from the device: what its memory holds is vouched for.
            checks = shard_checks(checkpoint, fds, load.readers(len(checkpoint.shards)))
            done, total = 0, sum(shard.size for shard in checkpoint.shards)
            for check in checks:
                for index in range(check.data_chunks.stop):
                    if progress is not None:
                        progress("verify", done + index * check.chunk_bytes, total)
                    check.check(index)
                done += check.shard.size
            stats.verified = True
            stats.copy_s += time.perf_counter() - verifying
        built = time.perf_counter()
        tensors = load.build()
        for shard, fd, stamp in zip(checkpoint.shards, fds, stamps, strict=True):
            check_stamp(shard, fd, stamp)
    stats.open_s = opened - started
    stats.build_s = time.perf_counter() - built
    stats.elapsed_s = time.perf_counter() - started
    stats.count_tensors_alone()
    return Loaded(tensors, stats)


def fill_from_files(
    checkpoint: Checkpoint, load: DeviceLoad, progress: ProgressFn | None = None
) -> FillFn:
    """What reads every shard from its file."""

    def fill(fds: Sequence[int], stats: LoadStats) -> None:
        spans = [
            file_span(number, shard, fd, shard.data_offset, shard.size)
            for number, (shard, fd) in enumerate(zip(checkpoint.shards, fds, strict=True))
        ]
        count_files(stats, load.read(spans, report(progress, load.nbytes)))

    return fill


def file_span(number: int, shard: Shard, fd: int, start: int, end: int) -> Span:
    """A part of a shard, in its own file."""
    return Span(number, start, end, fd, str(shard.path), start)


def count_files(stats: LoadStats, now: Progress | None) -> None:
    """Add what a read of files did."""
    if now is not None:
        stats.disk_bytes += now.bytes_disk
        stats.page_cache_bytes += now.bytes_cache
        stats.copy_s += max(0.0, now.copy_s - now.read_s)

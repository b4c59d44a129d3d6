"""Load through the store: its segments become part of the tensors' memory, the rest is read."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from sllmctl.core.checkpoint import Checkpoint, Shard
from sllmctl.core.digest import memory_reader, shard_checks
from sllmctl.core.load import (
    Loaded,
    LoadOptions,
    LoadStats,
    check_memory,
    check_stamp,
    open_shard,
    stamp_of,
)
from sllmctl.core.progress import ProgressFn
from sllmctl.core.tensors import TensorBuilder
from sllmctl.errors import StoreError
from sllmctl.native import PAGE_BYTES, Extent, Job, Memory
from sllmctl.store.client import StoreClient
from sllmctl.store.protocol import Message
from sllmctl.store.residency import Piece

log = logging.getLogger(__name__)
_VERIFY_THREADS = 2


@dataclass(slots=True)
class _Arrival:
    """Which parts of which shard are in their place, and which will never come from the store."""

    shards: Sequence[Shard]
    memories: Sequence[Memory]
    segment_bytes: int
    placed: set[Piece] = field(default_factory=set)
    from_disk: set[Piece] = field(default_factory=set)

    def size(self, piece: Piece) -> int:
        """Bytes of a part."""
        shard, index = piece
        return min(self.segment_bytes, self.shards[shard].size - index * self.segment_bytes)

    def tensor_bytes(self, piece: Piece) -> int:
        """Bytes of a part that are tensors', and not a header's."""
        shard, index = piece
        start = max(index * self.segment_bytes, self.shards[shard].data_offset)
        return max(0, index * self.segment_bytes + self.size(piece) - start)

    def place(self, piece: Piece, fd: int) -> None:
        """Map a segment where its bytes belong; closes the descriptor."""
        shard, index = piece
        try:
            if not 0 <= shard < len(self.shards) or index < 0 or self.size(piece) <= 0:
                raise StoreError(f"the store sent a part {piece} that the checkpoint has not")
            nbytes = -(-self.size(piece) // PAGE_BYTES) * PAGE_BYTES
            if os.fstat(fd).st_size < nbytes:
                raise StoreError(f"the store sent a segment of less than {nbytes} bytes")
            self.memories[shard].place(index * self.segment_bytes, fd, nbytes)
        finally:
            os.close(fd)
        self.placed.add(piece)

    def missing(self) -> list[Piece]:
        """Parts that are not in their place, in file order."""
        return [
            (number, index)
            for number, shard in enumerate(self.shards)
            for index in range(-(-shard.size // self.segment_bytes))
            if (number, index) not in self.placed
        ]


def load_through_store(
    checkpoint: Checkpoint,
    options: LoadOptions,
    client: StoreClient,
    *,
    label: str,
    progress: ProgressFn | None = None,
) -> Loaded:
    """Load every tensor of a checkpoint, from the store as far as it has or gets it.

    What is warm is mapped and nothing is copied; what the store cannot keep is read from disk, as
    is everything that was still to come when the store goes away. The connection is the lease: it
    ends with the last tensor.

    Raises:
        StoreError: The store refuses the attach. Nothing was loaded.
        SllmError: As ``core.load.load`` raises them.
    """
    started = time.perf_counter()
    builder = TensorBuilder(checkpoint)
    stats = LoadStats(len(checkpoint.tensors) + len(checkpoint.aliases), checkpoint.nbytes)
    shards = checkpoint.shards
    with ExitStack() as stack:
        fds = [open_shard(shard, stack) for shard in shards]
        stamps = [stamp_of(fd) for fd in fds]
        client.send_shards([shard.path.name for shard in shards], fds)
        client.send({"op": "attach", "label": label})
        attached, _ = client.receive()
        stats.open_s = time.perf_counter() - started
        memories = [Memory.create(shard.size, lease=client) for shard in shards]
        arrival = _Arrival(shards, memories, client.segment_bytes)
        stats.plan_s = time.perf_counter() - started - stats.open_s
        _take(client, attached, arrival, stats, progress)
        _read_rest(arrival, fds, options, stats, progress)
        stats.read_s = time.perf_counter() - started - stats.open_s - stats.plan_s
        places = [(memory, 0) for memory in memories]
        if options.verify:
            _verify(checkpoint, fds, places)
            stats.verified = True
        built = time.perf_counter()
        tensors = builder.build(checkpoint.tensors.values(), places)
        for alias, kept in checkpoint.aliases.items():
            tensors[alias] = tensors[kept]
        for shard, fd, stamp in zip(shards, fds, stamps, strict=True):
            check_stamp(shard, fd, stamp)
    stats.build_s = time.perf_counter() - built
    stats.count_tensors_alone()
    stats.elapsed_s = time.perf_counter() - started
    return Loaded(tensors, stats)


def _take(
    client: StoreClient,
    attached: Message,
    arrival: _Arrival,
    stats: LoadStats,
    progress: ProgressFn | None,
) -> None:
    """Place what the store sends until it has no more."""
    total = sum(shard.size for shard in arrival.shards)
    done = 0
    try:
        coming = {(shard, index) for shard, index in attached["coming"]}
        while True:
            message, fds = client.receive()
            if message.get("event") == "settled":
                return
            pieces = [(shard, index) for shard, index in message["pieces"]]
            for piece, fd in zip(pieces, fds, strict=True):
                arrival.place(piece, fd)
                nbytes = arrival.tensor_bytes(piece)
                done += arrival.size(piece)
                if piece in coming:
                    stats.disk_bytes += nbytes
                else:
                    stats.store_bytes += nbytes
                    stats.mapped_bytes += nbytes
            if progress is not None:
                progress("read", done, total)
    except (StoreError, KeyError, TypeError, ValueError) as exc:
        log.warning("the store went away during the load (%s); the rest comes from disk", exc)
        client.close()


def _read_rest(
    arrival: _Arrival,
    fds: Sequence[int],
    options: LoadOptions,
    stats: LoadStats,
    progress: ProgressFn | None,
) -> None:
    """Read what the store does not have, straight to its place."""
    missing = arrival.missing()
    if not missing:
        return
    check_memory(sum(map(arrival.size, missing)))
    extents = [
        Extent(
            shard,
            index * arrival.segment_bytes,
            arrival.size((shard, index)),
            arrival.memories[shard].address + index * arrival.segment_bytes,
        )
        for shard, index in missing
    ]
    files = [(fd, str(shard.path)) for fd, shard in zip(fds, arrival.shards, strict=True)]
    with Job(
        files,
        extents,
        keep=arrival.memories,
        chunk_bytes=options.chunk_bytes,
        threads=options.threads,
    ) as job:
        done = False
        while not done:
            done, now = job.wait()
            if progress is not None:
                progress("read", now.bytes_done, now.bytes_total)
    tensor_bytes = sum(map(arrival.tensor_bytes, missing))
    cached = min(now.bytes_cache, tensor_bytes)
    stats.page_cache_bytes += cached
    stats.disk_bytes += tensor_bytes - cached


def _verify(
    checkpoint: Checkpoint, fds: Sequence[int], places: Sequence[tuple[Memory, int]]
) -> None:
    checks = shard_checks(checkpoint, fds, [memory_reader(*place) for place in places])
    with ThreadPoolExecutor(_VERIFY_THREADS, "sllm-verify") as pool:
        results = [
            pool.submit(check.check, index)
            for check in checks
            for index in range(check.data_chunks.stop)
        ]
        try:
            for result in results:
                result.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

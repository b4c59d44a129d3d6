"""Load through the store: its segments become part of the tensors' memory, the rest is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from sllmctl.core.checkpoint import Checkpoint
from sllmctl.core.device_load import DeviceLoad, count_files
from sllmctl.core.digest import Verification, memory_reader, shard_checks
from sllmctl.core.load import (
    Loaded,
    LoadOptions,
    LoadStats,
    check_memory,
    check_stamp,
    open_shard,
    stamp_of,
)
from sllmctl.core.progress import ProgressFn, report
from sllmctl.core.tensors import TensorBuilder
from sllmctl.native import PAGE_BYTES, Extent, Job, Memory
from sllmctl.store.client import StoreClient
from sllmctl.store.delivery import Delivery, attach
from sllmctl.store.named import NamedModel
from sllmctl.store.protocol import close_fds
from sllmctl.store.residency import Piece


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
    shards = checkpoint.shards
    done, total = 0, sum(shard.size for shard in shards)

    def watch() -> None:
        if progress is not None:
            progress("read", done, total)

    with ExitStack() as stack:
        client.watch = watch
        stack.callback(setattr, client, "watch", None)
        fds = [open_shard(shard, stack) for shard in shards]
        stamps = [stamp_of(fd) for fd in fds]
        delivery = attach(client, shards, fds, label)
        opened_s = time.perf_counter() - started

        def place(memories: Sequence[Memory]) -> None:
            nonlocal done
            for parts in delivery.parts():
                place_parts(memories, parts, delivery)
                done += sum(map(delivery.nbytes, parts))
                watch()

        loaded = _load(checkpoint, options, client, delivery, fds, place, progress)
        for shard, fd, stamp in zip(shards, fds, stamps, strict=True):
            check_stamp(shard, fd, stamp)
    loaded.stats.open_s += opened_s
    loaded.stats.elapsed_s = time.perf_counter() - started
    return loaded


def load_named(
    model: NamedModel, options: LoadOptions, progress: ProgressFn | None = None
) -> Loaded:
    """Load every tensor of a model that a store has by its name; its descriptors are closed.

    Raises:
        CheckpointError: A file was written to; ``verify``: digests are beside the weights.
        SllmError: As ``core.load.load`` raises them.
    """

    def place(memories: Sequence[Memory]) -> None:
        held, model.held = model.held, {}
        place_parts(memories, held, model.delivery)

    try:
        loaded = _load(
            model.checkpoint, options, model.client, model.delivery, model.files, place, progress
        )
        model.check_files()
        return loaded
    finally:
        model.close()


def load_named_to_devices(
    model: NamedModel,
    load: DeviceLoad,
    options: LoadOptions,
    progress: ProgressFn | None = None,
) -> Loaded:
    """Bring a model that a store has by its name to devices; its lease ends.

    Raises:
        CheckpointError: A file was written to; ``verify``: digests are beside the weights.
        ReadError, DeviceError: As ``DeviceLoad.read`` raises them.
    """
    started = time.perf_counter()
    checkpoint, delivery = model.checkpoint, model.delivery
    stats = LoadStats(len(checkpoint.tensors) + len(checkpoint.aliases), checkpoint.nbytes)
    try:
        if options.verify:
            shard_checks(checkpoint, model.files, load.readers(len(checkpoint.shards)))
        load.read(map(model.span, delivery.got), report(progress, load.nbytes))
        delivery.count(stats, checkpoint.shards)
        stats.mapped_bytes = 0
        count_files(stats, load.read(map(model.span, delivery.missing())))
        model.check_files()
    finally:
        model.close()
        model.client.close()
    stats.read_s = time.perf_counter() - started
    tensors = load.build()
    stats.build_s = time.perf_counter() - started - stats.read_s
    stats.elapsed_s = time.perf_counter() - started
    stats.count_tensors_alone()
    return Loaded(tensors, stats)


def _load(
    checkpoint: Checkpoint,
    options: LoadOptions,
    client: StoreClient,
    delivery: Delivery,
    fds: Sequence[int],
    place: Callable[[Sequence[Memory]], None],
    progress: ProgressFn | None,
) -> Loaded:
    """Make memory for the shards, have the store's parts placed in it, and read the others."""
    started = time.perf_counter()
    builder = TensorBuilder(checkpoint)
    stats = LoadStats(len(checkpoint.tensors) + len(checkpoint.aliases), checkpoint.nbytes)
    memories = [Memory.create(shard.size, lease=client) for shard in checkpoint.shards]
    places = [(memory, 0) for memory in memories]
    checks = (
        shard_checks(checkpoint, fds, [memory_reader(*place) for place in places])
        if options.verify
        else []
    )
    stats.plan_s = time.perf_counter() - started
    place(memories)
    delivery.count(stats, checkpoint.shards)
    _read_rest(checkpoint, memories, delivery, fds, options, stats, progress)
    if checks:
        Verification.of_all(checks)
        stats.verified = True
    built = time.perf_counter()
    stats.read_s = built - started - stats.plan_s
    tensors = builder.build(checkpoint.tensors.values(), places)
    for alias, kept in checkpoint.aliases.items():
        tensors[alias] = tensors[kept]
    stats.build_s = time.perf_counter() - built
    stats.count_tensors_alone()
    stats.elapsed_s = time.perf_counter() - started
    return Loaded(tensors, stats)


def place_parts(memories: Sequence[Memory], parts: dict[Piece, int], delivery: Delivery) -> None:
    """Map segments where their bytes belong; closes the descriptors."""
    try:
        for (shard, index), fd in parts.items():
            nbytes = -(-delivery.nbytes((shard, index)) // PAGE_BYTES) * PAGE_BYTES
            memories[shard].place(index * delivery.segment_bytes, fd, nbytes)
    finally:
        close_fds(list(parts.values()))


def _read_rest(
    checkpoint: Checkpoint,
    memories: Sequence[Memory],
    delivery: Delivery,
    fds: Sequence[int],
    options: LoadOptions,
    stats: LoadStats,
    progress: ProgressFn | None,
) -> None:
    """Read what the store does not have, straight to its place."""
    missing = delivery.missing()
    if not missing:
        return
    check_memory(sum(map(delivery.nbytes, missing)))
    unit = delivery.segment_bytes
    extents = [
        Extent(
            shard,
            index * unit,
            delivery.nbytes((shard, index)),
            memories[shard].address + index * unit,
        )
        for shard, index in missing
    ]
    files = [(fd, str(shard.path)) for fd, shard in zip(fds, checkpoint.shards, strict=True)]
    with Job(
        files,
        extents,
        keep=memories,
        chunk_bytes=options.chunk_bytes,
        threads=options.threads,
    ) as job:
        done = False
        while not done:
            done, now = job.wait()
            if progress is not None:
                progress("read", now.bytes_done, now.bytes_total)
    nbytes = sum(delivery.tensor_bytes(piece, checkpoint.shards) for piece in missing)
    cached = min(now.bytes_cache, nbytes)
    stats.page_cache_bytes += cached
    stats.disk_bytes += nbytes - cached

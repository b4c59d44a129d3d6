"""What the machine can do at best: its disk, its page cache, its memory, its device link."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sllmctl.bench.measure import (
    Held,
    Sample,
    cpu_seconds,
    measure_load,
    reader_threads,
    synchronize,
    touch,
)
from sllmctl.core.devices import find_device
from sllmctl.native import Memory

BLOCK_BYTES = 16 * 2**20
COPY_THREADS = 2
READ_THREADS = 4
PINNED_SLOTS = 4


def raw_direct(paths: Sequence[Path]) -> Sample:
    """Read every byte around the page cache into a few reused buffers: the disk's limit."""
    return _read_files(paths, os.O_DIRECT, READ_THREADS)


def through_page_cache(paths: Sequence[Path]) -> Sample:
    """Read every byte with ``read`` into a few reused buffers, which stay in the processor's."""
    return _read_files(paths, 0, reader_threads(), 2**20)


def _read_files(
    paths: Sequence[Path], flags: int, threads: int, block_bytes: int = BLOCK_BYTES
) -> Sample:
    blocks = [
        (path, offset) for path in paths for offset in range(0, path.stat().st_size, block_bytes)
    ]

    # Huge pages: a direct read into others is slower. They are there before the clock starts.
    memories = [Memory.create(block_bytes) for _ in range(threads)]
    for memory in memories:
        touch(memory)

    def read(first: int) -> None:
        memory = memories[first]
        fds = {path: os.open(path, os.O_RDONLY | flags) for path in paths}
        for path, offset in blocks[first::threads]:
            os.preadv(fds[path], [memory.buffer], offset)
        for fd in fds.values():
            os.close(fd)

    cpu, started = cpu_seconds(), time.perf_counter()
    _in_threads(read, threads)
    elapsed = time.perf_counter() - started
    return Sample(elapsed, elapsed, cpu_s=cpu_seconds() - cpu)


def plain_copy(nbytes: int) -> Sample:
    """Copy memory into fresh 2 MiB pages with two threads: the private copy's limit."""
    source = Memory.create(nbytes)
    touch(source)
    cpu, started = cpu_seconds(), time.perf_counter()
    target = Memory.create(nbytes)
    part = -(-nbytes // COPY_THREADS)

    def copy(number: int) -> None:
        start, end = number * part, min(nbytes, (number + 1) * part)
        for at in range(start, end, BLOCK_BYTES):
            # ctypes gives up the interpreter's lock; a slice assignment does not.
            length = min(BLOCK_BYTES, end - at)
            ctypes.memmove(target.address + at, source.address + at, length)

    _in_threads(copy, COPY_THREADS)
    elapsed = time.perf_counter() - started
    return Sample(elapsed, cpu_s=cpu_seconds() - cpu, private_bytes=nbytes, peak_bytes=nbytes)


def memory_read(nbytes: int) -> Sample:
    """Read every byte once of memory that is there, in 2 MiB pages: what no loader can beat."""
    import torch

    memory = Memory.create(nbytes)
    touch(memory)
    held = Held({"": torch.frombuffer(memory.buffer, dtype=torch.uint8)})
    sample = measure_load(lambda: held)
    return Sample(0.0, sample.all_s)


def pinned_to_device(nbytes: int, device: str) -> Sample:
    """Copy page-locked memory to a device, from a few slots that are there: the link's limit."""
    import torch

    find_device(device)
    slot_bytes = min(nbytes, BLOCK_BYTES)
    slots = [
        torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(PINNED_SLOTS)
    ]
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target[: slots[0].numel()].copy_(slots[0], non_blocking=True)
    synchronize(device)
    started = time.perf_counter()
    for number, at in enumerate(range(0, nbytes, slot_bytes)):
        slot = slots[number % PINNED_SLOTS]
        target[at : at + slot_bytes].copy_(slot[: nbytes - at], non_blocking=True)
    synchronize(device)
    elapsed = time.perf_counter() - started
    return Sample(elapsed, elapsed)


def _in_threads(work: Callable[[int], None], threads: int) -> None:
    with ThreadPoolExecutor(threads, "bench-limit") as pool:
        for result in [pool.submit(work, number) for number in range(threads)]:
            result.result()

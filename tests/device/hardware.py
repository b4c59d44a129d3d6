"""Figures of a machine with a device, ready to paste: does a load reach the rate of its link?

    python -m tests.device.hardware --device npu:0 --size 8GiB --directory /dev/shm

It pins memory, copies pinned memory to the device in chunks of several sizes, loads a file that is
in memory already through the native library, reads it back to compare, and gathers slices.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_void_p
from functools import partial
from pathlib import Path

from sllmctl import native
from sllmctl.core.devices import DeviceSpec
from sllmctl.core.units import parse_size
from sllmctl.errors import SllmError
from tests.device.runtimes import RUNTIMES, Runtime

MIB = 1 << 20
TIMES = 3
CHUNKS = (1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB)
SLOTS = (2, 4, 8)
RING_CHUNKS = (4 * MIB, 8 * MIB, 16 * MIB)
PATTERN = bytes(range(251)) * 4177  # a prime length: no two chunks of a power of two are alike


def seconds(run: Callable[[], None]) -> float:
    """The median time of three runs."""
    taken = []
    for _ in range(TIMES):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[TIMES // 2]


def rate(nbytes: int, elapsed_s: float) -> str:
    """GB/s, as a table has it."""
    return f"{nbytes / elapsed_s / 1e9:.2f}"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def pinning(runtime: Runtime) -> None:
    """How long pinned memory takes: what a ring costs before its first load."""
    rows = []
    for nbytes, count in ((16 * MIB, 4), (16 * MIB, 16), (64 * MIB, 4), (256 * MIB, 1)):
        start = time.perf_counter()
        blocks = [runtime.pin(nbytes) for _ in range(count)]
        pinned = time.perf_counter()
        for block in blocks:
            runtime.unpin(block)
        freed = time.perf_counter()
        rows.append(
            [
                f"{count} x {nbytes // MIB} MiB",
                f"{(pinned - start) * 1e3:.1f}",
                f"{(freed - pinned) * 1e3:.1f}",
            ]
        )
    print("Pinned host memory:\n")
    table(["blocks", "pin, ms", "free, ms"], rows)


def copy_round(
    runtime: Runtime, target: int, blocks: list[c_void_p], chunk: int, nbytes: int
) -> None:
    """Copy so many bytes, from one buffer after the other."""
    for i in range(nbytes // chunk):
        runtime.copy(target + i * chunk, blocks[i % len(blocks)], chunk)
    runtime.synchronize()


def link(runtime: Runtime, target: int, nbytes: int) -> float:
    """Pinned memory to the device, by size and number of the buffers. Returns the best GB/s."""
    rows = []
    best = 0.0
    for chunk in CHUNKS:
        row = [f"{chunk // MIB} MiB"]
        for count in SLOTS:
            blocks = [runtime.pin(chunk) for _ in range(count)]
            elapsed = seconds(partial(copy_round, runtime, target, blocks, chunk, nbytes))
            best = max(best, nbytes / elapsed / 1e9)
            row.append(rate(nbytes, elapsed))
            for block in blocks:
                runtime.unpin(block)
        rows.append(row)
    print("Pinned memory to the device, GB/s, by chunk and number of buffers:\n")
    table(["chunk", *(f"{count}" for count in SLOTS)], rows)
    return best


@contextmanager
def warm_file(directory: Path, nbytes: int) -> Iterator[tuple[int, str]]:
    """A file in the page cache."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix="sllmctl-") as file:
        left = nbytes
        while left > 0:
            left -= file.write(PATTERN[: min(left, len(PATTERN))])
        file.flush()
        yield file.fileno(), file.name


def load_once(
    device: native.Device,
    ring: native.Ring,
    file: tuple[int, str],
    target: int,
    chunk: int,
    nbytes: int,
    registered: native.Registered | None = None,
) -> None:
    """The whole file to the device."""
    extents = [native.Extent(0, 0, nbytes, target, 0)]
    with native.Job(
        [file],
        extents,
        keep=None,
        chunk_bytes=chunk,
        devices=[device],
        ring=ring,
        registered=[registered],
    ) as job:
        while not job.wait()[0]:
            pass


def load(
    device: native.Device, file: tuple[int, str], target: int, nbytes: int, best: float
) -> None:
    """The whole file to the device, by chunk and number of slots."""
    rows = []
    for chunk in RING_CHUNKS:
        row = [f"{chunk // MIB} MiB"]
        for count in SLOTS:
            with native.Ring(device, chunk + native.PAGE_BYTES, count) as ring:
                elapsed = seconds(partial(load_once, device, ring, file, target, chunk, nbytes))
            share = nbytes / elapsed / 1e9 / best
            row.append(f"{rate(nbytes, elapsed)} ({share:.2f})")
        rows.append(row)
    print("A file in memory to the device, GB/s (share of the best above), by chunk and slots:\n")
    table(["chunk", *(f"{count}" for count in SLOTS)], rows)


def registered(
    device: native.Device, file: tuple[int, str], target: int, nbytes: int, best: float
) -> None:
    """The file copied from where it is mapped, and what it takes to register it for that."""
    start = time.perf_counter()
    try:
        mapping = native.Registered(device, file[0])
    except SllmError as exc:
        print(f"Not registered: {exc}.\n")
        return
    taken = [time.perf_counter() - start]
    with native.Ring(device, RING_CHUNKS[-1] + native.PAGE_BYTES, SLOTS[-1]) as ring:
        once = partial(load_once, device, ring, file, target, RING_CHUNKS[-1], nbytes, mapping)
        elapsed = seconds(once)
    start = time.perf_counter()
    mapping.close()
    taken.append(time.perf_counter() - start)
    share = nbytes / elapsed / 1e9 / best
    print("The same file, registered with the device and copied from where it is mapped:\n")
    table(
        ["register, s", "copy, GB/s (share of the best above)", "unregister, s"],
        [[f"{taken[0]:.3f}", f"{rate(nbytes, elapsed)} ({share:.2f})", f"{taken[1]:.3f}"]],
    )


def compare(runtime: Runtime, target: int, nbytes: int) -> None:
    """Read the device back, and stop where it does not hold the file."""
    block = 32 * MIB
    for offset in range(0, nbytes, block):
        skip = offset % len(PATTERN)
        expected = (PATTERN * (block // len(PATTERN) + 2))[skip : skip + block]
        if runtime.read(target + offset, block) != expected:
            raise SystemExit(f"WRONG: the device does not hold the file's bytes from {offset} on")
    print("Every byte of the last load was read back and is right.\n")


def gather_once(
    gathering: native.Gather, target: int, source: int, rows: int, row_bytes: int, stride: int
) -> None:
    """One slice, to its end."""
    gathering.copy(target, source, rows=rows, row_bytes=row_bytes, source_stride_bytes=stride)
    gathering.synchronize()


def gather(device: native.Device, target: int, nbytes: int, best: float) -> None:
    """Slices of ordinary memory: a tensor-parallel rank's part of a weight."""
    lines = []
    source = native.Memory.create(nbytes)
    for row_bytes, stride in ((2048, 4096), (2048, 16384), (8192, 16384), (16384, 16384)):
        rows = nbytes // stride
        with (
            native.Ring(device, 8 * MIB, 8) as ring,
            native.Gather(device, ring) as gathering,
        ):
            run = partial(gather_once, gathering, target, source.address, rows, row_bytes, stride)
            elapsed = seconds(run)
        moved = rows * row_bytes
        share = moved / elapsed / 1e9 / best
        lines.append([f"{row_bytes} of {stride}", f"{rate(moved, elapsed)} ({share:.2f})"])
    print("Rows of ordinary memory, packed and copied, GB/s moved (share of the best above):\n")
    table(["bytes of a row", "GB/s"], lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", type=DeviceSpec.parse, default=DeviceSpec("npu"))
    parser.add_argument("--size", type=parse_size, default="4GiB", help="of the file; 4GiB")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    nbytes = options.size // (32 * MIB) * (32 * MIB)
    if nbytes == 0:
        parser.error("--size is at least 32MiB")
    with native.Device(options.device.kind, options.device.ordinal) as device:
        runtime = RUNTIMES[options.device.kind](options.device.ordinal)
        if runtime.emulated:
            print("**EMULATED: no device is behind these numbers; they say nothing.**\n")
        kernel = platform.release()
        print(
            f"{options.device}, {runtime.version()}, Linux {kernel} {platform.machine()},", end=""
        )
        print(f" {os.cpu_count()} CPUs, {nbytes / 2**30:g} GiB, {options.directory}\n")
        memory = runtime.allocate(nbytes)
        target = int(memory.value or 0)
        pinning(runtime)
        best = link(runtime, target, nbytes)
        with warm_file(options.directory, nbytes) as file:
            load(device, file, target, nbytes, best)
            registered(device, file, target, nbytes, best)
        compare(runtime, target, nbytes)
        gather(device, target, nbytes, best)
        runtime.free(memory)


if __name__ == "__main__":
    main()

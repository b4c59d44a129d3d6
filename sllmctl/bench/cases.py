"""What is measured: the machine's limits, our loads, and safetensors' own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sllmctl.bench.measure import Sample, cpu_seconds, touch
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.load import LoadOptions, load
from sllmctl.native import Memory
from sllmctl.store.client import StoreClient
from sllmctl.store.load import load_through_store

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 16 * 2**20
COPY_THREADS = 2
READ_THREADS = 4


def raw_direct(paths: Sequence[Path]) -> Sample:
    """Read every byte around the page cache into a few reused buffers: the disk's limit."""
    started = time.perf_counter()
    blocks = [
        (path, offset) for path in paths for offset in range(0, path.stat().st_size, BLOCK_BYTES)
    ]

    def read(numbers: range) -> None:
        memory = Memory.create(BLOCK_BYTES)  # huge pages: without them a direct read is slower
        fds = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths}
        for number in numbers:
            path, offset = blocks[number]
            os.preadv(fds[path], [memory.buffer], offset)
        for fd in fds.values():
            os.close(fd)

    _in_threads(read, [range(i, len(blocks), READ_THREADS) for i in range(READ_THREADS)])
    return Sample(time.perf_counter() - started)


def plain_copy(nbytes: int) -> Sample:
    """Copy memory into fresh 2 MiB pages with two threads: the private copy's limit."""
    source = Memory.create(nbytes)
    touch(source)
    origin = memoryview(source.buffer)
    cpu, started = cpu_seconds(), time.perf_counter()
    target = Memory.create(nbytes)
    into = memoryview(target.buffer)
    half = nbytes // COPY_THREADS

    def copy(start: int) -> None:
        for at in range(start, min(start + half, nbytes), BLOCK_BYTES):
            end = min(at + BLOCK_BYTES, start + half, nbytes)
            # ctypes' memmove gives up the interpreter's lock; a slice assignment does not.
            _memmove(into[at:end], origin[at:end])

    _in_threads(copy, [half * i for i in range(COPY_THREADS)])
    return Sample(time.perf_counter() - started, cpu_s=cpu_seconds() - cpu)


def memory_read(nbytes: int) -> Sample:
    """Read every byte once of memory that is there, in 2 MiB pages: what no loader can beat."""
    import torch

    memory = Memory.create(nbytes)
    touch(memory)
    tensors = {
        str(at): torch.frombuffer(
            memory.buffer, dtype=torch.uint8, count=min(BLOCK_BYTES, nbytes - at), offset=at
        )
        for at in range(0, nbytes, BLOCK_BYTES)
    }
    started = time.perf_counter()
    _sums(tensors)
    return Sample(0.0, time.perf_counter() - started)


def _memmove(into: memoryview, origin: memoryview) -> None:
    import ctypes

    destination = (ctypes.c_char * len(into)).from_buffer(into)
    source = (ctypes.c_char * len(origin)).from_buffer(origin)
    ctypes.memmove(destination, source, len(origin))


def ours(path: Path, *, map_files: str = "auto") -> Sample:
    """`sllmctl load`, and then every byte once."""
    cpu, started = cpu_seconds(), time.perf_counter()
    options = LoadOptions("never" if map_files == "never" else "auto")
    loaded = load(open_checkpoint(path), options)
    ready = time.perf_counter() - started
    cpu = cpu_seconds() - cpu
    check = _sums(loaded.tensors)
    return Sample(ready, time.perf_counter() - started, cpu_s=cpu, check=check)


def through_store(path: Path, socket: Path) -> Sample:
    """A load through the store, and then every byte once."""
    cpu, started = cpu_seconds(), time.perf_counter()
    client = StoreClient(socket)
    loaded = load_through_store(open_checkpoint(path), LoadOptions(), client, label=path.name)
    ready = time.perf_counter() - started
    cpu = cpu_seconds() - cpu
    check = _sums(loaded.tensors)
    return Sample(ready, time.perf_counter() - started, cpu_s=cpu, check=check)


def safetensors_load(path: Path, how: str = "mmap") -> Sample:
    """`safetensors.torch.load_file` of every shard: mapped, cloned, or read (`pread`)."""
    from safetensors.torch import load_file

    shards = [shard.path for shard in open_checkpoint(path).shards]
    cpu, started = cpu_seconds(), time.perf_counter()
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        if how == "pread":
            tensors |= load_file(shard, backend="pread")
        else:
            tensors |= load_file(shard)
    if how == "clone":
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    ready = time.perf_counter() - started
    cpu = cpu_seconds() - cpu
    check = _sums(tensors)
    return Sample(ready, time.perf_counter() - started, cpu_s=cpu, check=check)


def torch_load(path: Path, *, mapped: bool) -> Sample:
    """`torch.load` of the same tensors, saved by `torch.save` beforehand."""
    import torch

    cpu, started = cpu_seconds(), time.perf_counter()
    tensors = torch.load(path, mmap=mapped, weights_only=True)
    ready = time.perf_counter() - started
    cpu = cpu_seconds() - cpu
    check = _sums(tensors)
    return Sample(ready, time.perf_counter() - started, cpu_s=cpu, check=check)


def copy_files(paths: Sequence[Path], target: Path) -> Sample:
    """`cp` and fsync: the conversion's limit."""
    import subprocess

    started = time.perf_counter()
    target.mkdir()
    subprocess.run(["cp", *map(str, paths), str(target)], check=True)
    for path in paths:
        fd = os.open(target / path.name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    sample = Sample(time.perf_counter() - started)
    shutil.rmtree(target)
    return sample


def convert_checkpoint(path: Path, target: Path, *, verify: bool) -> Sample:
    """`sllmctl convert` of a local directory, in a process of its own: its memory counts."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "sllmctl", "convert", str(path), "--output", str(target)]
    cpu = _children_cpu()
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--json", *([] if verify else ["--no-verify"])],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    elapsed = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    # Without the interpreter's start, as `cp` has none to speak of.
    elapsed = min(elapsed, json.loads(done.stdout)["elapsed_s"])
    shutil.rmtree(target)
    return Sample(elapsed, cpu_s=_children_cpu() - cpu, peak_bytes=peak)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _sums(tensors: Mapping[str, torch.Tensor]) -> str:
    """Read every byte once, by two threads; the sum is the same for the same bytes."""
    import torch

    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    sums = [0] * len(flat)

    def add(numbers: range) -> None:
        for number in numbers:
            piece = flat[number]
            whole = piece[: piece.numel() // 8 * 8]
            aligned = whole.data_ptr() % 8 == 0
            sums[number] = int((whole.view(torch.int64) if aligned else whole).sum())

    torch.set_num_threads(1)
    _in_threads(add, [range(i, len(flat), COPY_THREADS) for i in range(COPY_THREADS)])
    return f"{sum(sums) & 0xFFFFFFFFFFFFFFFF:016x}"


def _in_threads(work: Callable[..., None], arguments: Iterable[object]) -> None:
    threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def save_for_torch(path: Path) -> Path:
    """Write a checkpoint's tensors with `torch.save`, beside nothing that matters."""
    import torch

    loaded = load(open_checkpoint(path), LoadOptions())
    target = Path(tempfile.mkdtemp(prefix="sllmctl-bench-", dir=path.parent)) / "model.pt"
    torch.save(loaded.tensors, target)
    return target

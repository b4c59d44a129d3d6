"""Run a case in a process of its own, and take its times, memory and a digest of its bytes.

The parent has imported what the cases need and loaded nothing; each sample is a fork of it, so that
imports are not measured and nothing is left over from the sample before.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sllmctl.bench.ownmemory import own_memory
from sllmctl.core.header import one_line
from sllmctl.errors import SllmError
from sllmctl.native import PAGE_BYTES, Memory

if TYPE_CHECKING:
    import torch

MAX_READERS = 8
_BLOCK_BYTES = 4 * 2**20
_WAIT_SLICE_S = 0.2


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a case.

    Attributes:
        ready_s: Until the call returned every tensor, in seconds.
        all_s: Until every byte had been read once after that; None where it makes no sense.
        cpu_s: User and system time until ready, all threads.
        peak_bytes: Most resident memory until ready above what was there before, mapped files
            included.
        private_bytes: Memory until ready that no other process shares.
        disk_bytes: Read from the disk, until the end.
        check: Digest of every name and byte.
        stages: Seconds of parts that a case tells apart.
    """

    ready_s: float
    all_s: float | None = None
    cpu_s: float = 0.0
    peak_bytes: int = 0
    private_bytes: int = 0
    disk_bytes: int = 0
    check: str | None = None
    stages: Mapping[str, float] = field(default_factory=dict)


def run_forked(case: Callable[[], Sample], *, deadline_s: float, pretouch_bytes: int = 0) -> Sample:
    """Run a case in a forked child, whose children end with it.

    Args:
        case: Runs in the child; what it returns comes back.
        deadline_s: When to give up.
        pretouch_bytes: Memory to touch and free first: a virtual machine may have given free
            memory back to its host, and a first touch then costs more than the load.

    Raises:
        SllmError: The case failed, and the message says how; or the deadline passed.
    """
    with Forked(case, pretouch_bytes) as child:
        return child.result(time.monotonic() + deadline_s)


class Forked:
    """A child that runs a case; it does not outlive the block.

    Args:
        case: See `run_forked`.
        pretouch_bytes: See there.
        leads: Whether it leads a process group, which ends with it: not where the parent is a
            child of this kind itself.
    """

    def __init__(
        self, case: Callable[[], Sample], pretouch_bytes: int = 0, *, leads: bool = True
    ) -> None:
        self._reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of fork beside threads; those that imports leave behind are idle.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            _child(case, pretouch_bytes, self._reader, writer, leads)
        os.close(writer)
        self._status: int | None = None

    def result(self, deadline: float) -> Sample:
        """What the case returned, by a time of the monotonic clock.

        Raises:
            SllmError: The case failed, or the deadline passed.
        """
        text = _read_all(self._reader, deadline)
        self._status = os.waitpid(self._pid, 0)[1]
        if not text:
            ended = os.waitstatus_to_exitcode(self._status)
            how = signal.Signals(-ended).name if ended < 0 else f"exit code {ended}"
            raise SllmError(f"the process died of {how}")
        document = json.loads(text)
        if "error" in document:
            raise SllmError(document["error"])
        return Sample(**document)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reader)
        if self._status is None:
            _kill_group(self._pid)
            os.waitpid(self._pid, 0)


def _read_all(reader: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([reader], [], [], _WAIT_SLICE_S)
        if ready:
            part = os.read(reader, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
        elif time.monotonic() > deadline:
            raise SllmError("no answer within the deadline; the process was killed")


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
        return


def _child(
    case: Callable[[], Sample], pretouch_bytes: int, reader: int, writer: int, leads: bool
) -> None:  # pragma: no cover - never returns
    """The child's whole life."""
    try:
        if leads:
            os.setpgid(0, 0)
        os.close(reader)
        os.dup2(2, 1)  # stdout is the report's
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        gc.collect()
        settle(pretouch_bytes)
        document: dict[str, Any] = asdict(case())
    except BaseException as exc:
        first = str(exc).strip().partition("\n")[0]
        document = {"error": one_line(first if isinstance(exc, SllmError) else _named(exc, first))}
    finally:
        try:
            os.write(writer, json.dumps(document).encode())
        finally:
            os._exit(0)


def _named(exc: BaseException, text: str) -> str:
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


@dataclass(slots=True)
class Held:
    """Tensors by name, and what has to live as long as they are looked at."""

    tensors: Mapping[str, torch.Tensor]
    keep: object = None


def measure_load(load: Callable[[], Held], device: str = "cpu") -> Sample:
    """Time a load, and then read every byte that it brought."""
    reset_peak()
    before, blocks = memory(), disk_reads()
    cpu, started = cpu_seconds(), time.perf_counter()
    held = load()
    synchronize(device)
    ready = time.perf_counter() - started
    cpu = cpu_seconds() - cpu
    after = memory()
    started = time.perf_counter()
    check = read_every_byte(held.tensors)
    reading = time.perf_counter() - started
    return Sample(
        ready,
        ready + reading if device == "cpu" else ready,  # a device's bytes are there when ready
        cpu_s=cpu,
        peak_bytes=max(0, after["VmHWM"] - before["VmRSS"]),
        private_bytes=max(0, after["RssAnon"] - before["RssAnon"]),
        disk_bytes=disk_reads() - blocks,
        check=check,
    )


def read_every_byte(tensors: Mapping[str, torch.Tensor]) -> str:
    """Read every byte once, by some threads, and digest it together with its tensor's name.

    The digest does not depend on the order of the tensors, nor on where they lie.
    """
    blocks = [
        (f"{name} {start}", view[start : start + _BLOCK_BYTES])
        for name, tensor in tensors.items()
        for view in (_bytes_of(tensor),)
        for start in range(0, len(view) or 1, _BLOCK_BYTES)
    ]
    threads = reader_threads()
    with ThreadPoolExecutor(threads, "bench-read") as pool:
        sums = pool.map(lambda part: _digest(blocks[part::threads]), range(threads))
    return f"{sum(sums) & 0xFFFFFFFFFFFFFFFF:016x}"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array)


def _digest(blocks: list[tuple[str, memoryview]]) -> int:
    return sum(
        xxhash.xxh3_64_intdigest(name.encode(), xxhash.xxh3_64_intdigest(block))
        for name, block in blocks
    )


def reader_threads() -> int:
    """Threads that read what was loaded: as many as there are cores, up to a few."""
    return min(MAX_READERS, len(os.sched_getaffinity(0)))


def synchronize(device: str) -> None:
    """Wait for the copies to a device."""
    kind = device.partition(":")[0]
    if kind != "cpu":
        import torch

        getattr(torch, kind).synchronize(device)


def settle(pretouch_bytes: int = 0) -> None:
    """Have this process' own memory, and so many bytes more that are there when they are wanted."""
    own_memory()  # first: it would take of the others
    if pretouch_bytes:
        touch(Memory.create(pretouch_bytes))


def touch(memory: Memory) -> None:
    """Write one byte a page, so that the memory is really there."""
    view = memoryview(memory.buffer)
    view[::PAGE_BYTES] = bytes(len(view[::PAGE_BYTES]))


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def memory(pid: int | str = "self") -> dict[str, int]:
    """Resident memory of a process in bytes: ``VmHWM`` at most, ``VmRSS``, ``RssAnon`` its own."""
    return {
        name: int(value.split()[0]) * 1024
        for name, _, value in (
            line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        if name in ("VmHWM", "VmRSS", "RssAnon")
    }


def reset_peak() -> None:
    """Begin to count the peak of resident memory anew. Source: proc(5), ``clear_refs``."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # a container may forbid it: peaks then include what the parent had


def disk_reads() -> int:
    """Bytes that this process has made the disk read."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0

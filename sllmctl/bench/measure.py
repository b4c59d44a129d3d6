"""Run a case in a process of its own, and take its times, memory and digests.

The parent has imported what the cases need and loaded nothing; each sample is a fork of it, so that
imports are not measured and nothing is left over from the sample before.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sllmctl.errors import SllmError
from sllmctl.native import Memory, probe_file

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
COLD_MAX_FRACTION = 0.01
HOT_MIN_FRACTION = 0.99


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. Seconds, bytes; ``all_s`` is when every byte had been read once as well."""

    ready_s: float
    all_s: float | None = None
    cpu_s: float = 0.0
    peak_bytes: int = 0
    disk_bytes: int = 0
    check: str | None = None


Case = Callable[[], Sample]


@dataclass(slots=True)
class Row:
    """All samples of one case."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    problem: str | None = None

    def median(self, what: str) -> float | None:
        """Median of a field over the samples; None where no sample has it."""
        values = [getattr(s, what) for s in self.samples if getattr(s, what) is not None]
        return statistics.median(values) if values else None

    def document(self) -> dict[str, object]:
        """As JSON: medians first, then every sample."""
        keys = ("ready_s", "all_s", "cpu_s", "peak_bytes")
        return {
            "name": self.name,
            "problem": self.problem,
            "median": {key: self.median(key) for key in keys},
            "samples": [asdict(sample) for sample in self.samples],
        }


def run_forked(case: Case, *, pretouch_bytes: int = 0) -> Sample:
    """Run a case in a forked child.

    Args:
        case: Runs in the child; what it returns comes back.
        pretouch_bytes: Memory to touch and free first: a virtual machine may have given free
            memory back to its host, and a first touch then costs more than the load.

    Raises:
        SllmError: The case failed; the message is its last line.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            _child(case, pretouch_bytes, writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    document = json.loads(text) if text else {"error": f"the process died, status {status}"}
    if "error" in document:
        raise SllmError(document["error"])
    # A case that measured a process of its own says so; else it is this child's memory.
    return Sample(**{**document, "peak_bytes": document["peak_bytes"] or usage.ru_maxrss * 1024})


def _child(case: Case, pretouch_bytes: int, writer: int) -> None:
    try:
        if pretouch_bytes:
            touch(Memory.create(pretouch_bytes))
        before, blocks = resource.getrusage(resource.RUSAGE_SELF), _disk_reads()
        sample = case()
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = sample.cpu_s or (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        document = asdict(sample) | {"cpu_s": cpu, "disk_bytes": _disk_reads() - blocks}
    except BaseException as exc:
        traceback.print_exc()
        document = {"error": f"{type(exc).__name__}: {exc}"}
    os.write(writer, json.dumps(document).encode())


def touch(memory: Memory) -> None:
    """Write one byte a page, so that the memory is really there."""
    view = memoryview(memory.buffer)
    step = 4096
    view[::step] = bytes(len(view[::step]))


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _disk_reads() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def make_cold(paths: Sequence[Path]) -> None:
    """Put files out of the page cache.

    Raises:
        SllmError: Some of them stayed.
    """
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(fd).st_size
            if probe_file(fd, str(path), 0, size).resident_bytes > size * COLD_MAX_FRACTION:
                _drop_everything()
            if probe_file(fd, str(path), 0, size).resident_bytes > size * COLD_MAX_FRACTION:
                raise SllmError(f"`{path}` stays in the page cache: no cold figure can be taken")
        finally:
            os.close(fd)


def _drop_everything() -> None:
    try:
        DROP_CACHES.write_text("1")
    except OSError:
        time.sleep(0.1)


def make_hot(paths: Sequence[Path]) -> None:
    """Read files until they are in the page cache.

    Raises:
        SllmError: They do not stay there.
    """
    block = bytearray(1 << 22)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for _ in range(2):
                facts = probe_file(file.fileno(), str(path), 0, size)
                if facts.resident_bytes >= size * HOT_MIN_FRACTION:
                    break
                file.seek(0)
                while file.readinto(block):
                    pass
            else:
                raise SllmError(f"`{path}` does not stay in the page cache: too little memory")

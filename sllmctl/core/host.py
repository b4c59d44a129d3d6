"""What this machine, and the container around us, have left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2^63."""


def available_memory_bytes(root: Path = Path("/"), *, mapped: bool = True) -> int:
    """Bytes that can still be allocated: MemAvailable, or less under a cgroup's limit.

    Memory that a cgroup counts as page cache can be reclaimed, and is left out of its usage; but
    what lies in a tmpfs or in shared memory, which it counts there as well, cannot.

    Args:
        root: Of the machine.
        mapped: Whether to count files that processes have mapped. They can be reclaimed, and are
            then read again by whoever uses them.

    Source: proc(5) MemAvailable; kernel docs, cgroup-v2 ``memory.max``, cgroup-v1 memory.
    """
    meminfo = _statistics(root / "proc/meminfo")
    available = meminfo.get("MemAvailable:", _UNLIMITED // 1024) * 1024
    if not mapped:
        available -= max(0, meminfo.get("Mapped:", 0) - meminfo.get("Shmem:", 0)) * 1024
    return max(0, min([available, *_cgroup_headrooms(root, mapped)]))


def _cgroup_headrooms(root: Path, mapped: bool) -> Iterator[int]:
    """What each memory cgroup that we are in leaves us, ancestors included."""
    top = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current", "file", "shmem", "file_mapped")
        base = top
        if controllers:
            names = (
                *("memory.limit_in_bytes", "memory.usage_in_bytes"),
                *("total_cache", "total_shmem", "total_mapped_file"),
            )
            base = top / "memory"
        directory = base / path.lstrip("/")
        # In a container the path is the host's; what is mounted is then the cgroup itself.
        for level in (directory, *directory.parents):
            limit = _read(level / names[0]).strip()
            if limit.isdigit() and int(limit) < _UNLIMITED:
                used = int(_read(level / names[1]).strip() or 0)
                statistics = _statistics(level / "memory.stat")
                cache, fixed, seen = (statistics.get(name, 0) for name in names[2:])
                kept = fixed if mapped else max(fixed, seen)
                yield max(0, int(limit) - used + max(0, cache - kept))
            if level == base:
                break


def _statistics(path: Path) -> dict[str, int]:
    """The numbers of a file whose lines begin with a name and a number."""
    lines = (line.split() for line in _read(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

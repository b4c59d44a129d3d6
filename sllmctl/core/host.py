"""What this machine, and the container around us, have left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2^63."""


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that can still be allocated: MemAvailable, or less under a cgroup's limit.

    Memory that a cgroup counts as page cache can be reclaimed, and is left out of its usage; but
    what lies in a tmpfs or in shared memory, which it counts there as well, cannot.

    Source: proc(5) MemAvailable; kernel docs, cgroup-v2 ``memory.max``, cgroup-v1 memory.
    """
    available = _UNLIMITED
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min([available, *_cgroup_headrooms(root)])


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """What each memory cgroup that we are in leaves us, ancestors included."""
    top = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current", "file", "shmem")
        base = top
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")
            base = top / "memory"
        directory = base / path.lstrip("/")
        # In a container the path is the host's; what is mounted is then the cgroup itself.
        for level in (directory, *directory.parents):
            limit = _read(level / names[0]).strip()
            if limit.isdigit() and int(limit) < _UNLIMITED:
                used = int(_read(level / names[1]).strip() or 0)
                cache, fixed = (_statistic(level / "memory.stat", name) for name in names[2:])
                yield max(0, int(limit) - used + max(0, cache - fixed))
            if level == base:
                break


def _statistic(path: Path, key: str) -> int:
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

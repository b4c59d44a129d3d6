"""MEM: host memory, what of it may be locked, and shared memory."""

from __future__ import annotations

import re

from sllmctl.doctor.check import (
    Finding,
    Status,
    check,
    fail,
    file,
    info,
    limit,
    ok,
    say,
    skip,
    warn,
)
from sllmctl.doctor.host import UNLIMITED
from sllmctl.doctor.machine import Machine

_GIB = 1 << 30
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for none
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available(m: Machine) -> tuple[int, str] | None:
    """Bytes that this process may still take, and the file that says so; None if none does."""
    text = m.probe.read_text("/proc/meminfo") or ""
    match = re.search(r"^MemAvailable:\s*(\d{1,18}) kB", text, re.MULTILINE)
    found = (int(match[1]) << 10, "/proc/meminfo") if match else None
    for most, used in _CGROUPS:
        top = _number(m, most)
        if top is None or top >= _NO_LIMIT:
            continue
        left = max(0, top - (_number(m, used) or 0))
        if found is None or left < found[0]:
            found = (left, most)
    return found


def _number(m: Machine, path: str) -> int | None:
    text = (m.probe.read_text(path) or "").strip()
    return int(text) if re.fullmatch(r"\d{1,20}", text) else None


@check(
    "MEM001",
    title="host memory suffices for the pool",
    why="a pool larger than what is free ends in 207001, or in a kill by the kernel",
    looks_at="MemAvailable, the limits of the cgroup, and --mem-pool-size",
    profiles="base convert",
)
def memory(m: Machine) -> Finding:
    found = available(m)
    if found is None:
        return skip(say("how much memory is free is not known"))
    free, source = found
    pool = m.options.pool_bytes
    if pool is not None and pool > 0.8 * free:
        return fail(
            say("the pool ({pool} MB) is too large for what is free ({free} MB)",
                pool=pool >> 20, free=free >> 20),
            file(source, free),
            advice=say("take at most {size} MB", size=int(0.8 * free) >> 20),
        )  # fmt: skip
    return ok(say("{free} MB of host memory are free", free=free >> 20), file(source, free))


@check(
    "MEM002",
    title="the pool may be locked",
    why="memory that is not locked may be swapped out, and RDMA cannot register it",
    looks_at="RLIMIT_MEMLOCK against --mem-pool-size",
    severity=Status.WARN,
    profiles="store",
)
def memlock(m: Machine) -> Finding:
    most = m.probe.host.memlock_bytes
    pool = m.options.pool_bytes
    if pool is None or most == UNLIMITED or most >= pool:
        return ok(say("nothing stands in the way of locking"))
    return warn(
        say("only {most} KB may be locked, the pool has {pool} MB",
            most=most >> 10, pool=pool >> 20),
        limit("RLIMIT_MEMLOCK", most),
        fix="docker run --ulimit memlock=-1 ..." if m.in_container else "ulimit -l unlimited",
    )  # fmt: skip


@check(
    "MEM003",
    title="/dev/shm is large enough",
    why="processes of one engine share it; 64 MB, Docker's default, ends in a bus error",
    looks_at="the size of /dev/shm",
    profiles="vllm sglang",
)
def shared(m: Machine) -> Finding:
    space = m.probe.space("/dev/shm")
    if space is None:
        return skip(say("/dev/shm cannot be seen"))
    seen = limit("/dev/shm", space.total_bytes)
    if space.total_bytes >= _GIB:
        return ok(say("/dev/shm has {size} MB", size=space.total_bytes >> 20), seen)
    made = fail if len(m.cards) > 1 else info
    return made(
        say("/dev/shm has only {size} MB", size=space.total_bytes >> 20),
        seen,
        fix="docker run --shm-size=16g ..."
        if m.in_container
        else "sudo mount -o remount,size=16g /dev/shm",
    )

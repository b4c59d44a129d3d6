"""MEM: host memory, what of it may be locked, and shared memory."""

from __future__ import annotations

import re
from pathlib import Path

from sllmctl.core.host import available_memory_bytes
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
_SWAPPINESS = 10
_UNKNOWN = 1 << 60  # more than any machine has


def available(m: Machine) -> tuple[int, str] | None:
    """Bytes that may still be taken, as `serve` reckons, and what limits them; None if unknown."""
    try:
        free = available_memory_bytes(Path(m.probe.root))
    except (ValueError, IndexError, OSError):
        return None
    if free >= _UNKNOWN:
        return None
    said = re.search(r"^MemAvailable:\s*(\d{1,18}) kB", meminfo(m), re.MULTILINE)
    whole = said is not None and int(said[1]) << 10 == free
    return free, "/proc/meminfo" if whole else "cgroup memory limit"


def meminfo(m: Machine) -> str:
    """What /proc/meminfo says, or ""."""
    return m.probe.read_text("/proc/meminfo") or ""


@check(
    "MEM001",
    title="host memory suffices for the pool",
    why="a pool larger than what is free ends in 207001, or in a kill by the kernel",
    looks_at="MemAvailable, the limits of the cgroups, and --mem-pool-size",
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
    if most == UNLIMITED or (pool is not None and most >= pool):
        return ok(say("nothing stands in the way of locking"))
    if pool is None:
        return info(
            say("only {most} KB may be locked", most=most >> 10), limit("RLIMIT_MEMLOCK", most)
        )
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
    if space is None or not m.probe.is_dir("/dev/shm"):
        return fail(
            say("there is no /dev/shm"),
            file("/dev/shm", "missing"),
            fix="docker run --shm-size=16g ..."
            if m.in_container
            else "sudo mkdir -p /dev/shm && sudo mount -t tmpfs -o size=16g tmpfs /dev/shm",
        )
    seen = limit("/dev/shm", space.total_bytes)
    if space.total_bytes >= _GIB:
        return ok(say("/dev/shm has {size} MB", size=space.total_bytes >> 20), seen)
    made = fail if len(m.cards) > 1 else warn
    return made(
        say("/dev/shm has only {size} MB", size=space.total_bytes >> 20),
        seen,
        fix="docker run --shm-size=16g ..."
        if m.in_container
        else "sudo mount -o remount,size=16g /dev/shm",
    )


@check(
    "MEM004",
    title="the kernel's settings are those that engines recommend",
    why="they cost some speed, and no more: a load works with any of them",
    looks_at="the CPU governor, NUMA balancing, transparent huge pages, swappiness and used swap",
    severity=Status.INFO,
    profiles="store vllm sglang",
)
def tuning(m: Machine) -> Finding:
    read = m.probe.read_text
    cpu = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    huge = "/sys/kernel/mm/transparent_hugepage/enabled"
    balancing, swappiness = "/proc/sys/kernel/numa_balancing", "/proc/sys/vm/swappiness"
    governor = (read(cpu) or "performance").strip()
    pages = re.search(r"\[(\w+)\]", read(huge) or "")
    eager = (read(swappiness) or "").strip()
    sizes = dict(re.findall(r"^(Swap\w+):\s*(\d{1,18}) kB", meminfo(m), re.MULTILINE))
    swapped = int(sizes.get("SwapTotal", 0)) - int(sizes.get("SwapFree", 0))
    found = []
    if governor != "performance":
        found.append((file(cpu, governor), "sudo cpupower frequency-set -g performance"))
    if (read(balancing) or "").strip() == "1":
        found.append((file(balancing, 1), "sudo sysctl -w kernel.numa_balancing=0"))
    if pages and pages[1] == "never":
        found.append((file(huge, "never"), f"echo madvise | sudo tee {huge}"))
    if m.swap_bytes and eager.isdigit() and int(eager) > _SWAPPINESS:
        found.append((file(swappiness, eager), f"sudo sysctl -w vm.swappiness={_SWAPPINESS}"))
    if "SwapFree" in sizes and swapped > 0:
        found.append((file("/proc/meminfo", f"{swapped} kB swapped out"), "swapon --show"))
    if not found:
        return ok(say("the kernel's settings are those that engines recommend"))
    return info(
        say("settings that engines recommend otherwise: {names}",
            names=", ".join(seen.name.rpartition("/")[2] for seen, _ in found)),
        *(seen for seen, _ in found),
        fix="; ".join(fix for _, fix in found),
    )  # fmt: skip

"""The machine that figures were taken on, as a reader needs it to believe them."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sllmctl.bench.measure import Sample, run_forked
from sllmctl.bench.ways import PEERS, version_of
from sllmctl.core.devices import find_device
from sllmctl.core.host import available_memory_bytes
from sllmctl.core.units import format_size
from sllmctl.errors import DeviceUnavailable, SllmError

_DEVICE_DEADLINE_S = 120.0
_LIBRARIES = ("torch", "numpy", "accelerate", "torch_npu", "vllm", "sglang")


def describe(path: Path, device: str = "cpu") -> dict[str, str]:
    """What the machine is: processor, memory, kernel, the disk below a path, versions.

    Returns:
        Lines for people by what they are about, without those that the system does not tell.

    Raises:
        DeviceUnavailable: The device is not there.
    """
    lines = {
        "processor": _processor(),
        "cores": _cores(),
        "memory": _memory(),
        "device": _device(device),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "page sizes": _pages(),
        "filesystem": _filesystem(path),
        "disk": _disk(path),
        "load at the start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "libraries": ", ".join(_versions()),
    }
    return {name: text for name, text in lines.items() if text}


def _versions() -> Iterator[str]:
    packages = dict.fromkeys(["sllmctl", *_LIBRARIES, *(way.package for way in PEERS)])
    for package in packages:
        if version := version_of(package):
            yield f"{package} {version}"


def _processor() -> str:
    text = _read("/proc/cpuinfo")
    for key in ("model name", "Hardware", "CPU implementer"):
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return platform.processor()


def _cores() -> str:
    usable, online = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    virtual = ", a virtual machine" if "hypervisor" in _read("/proc/cpuinfo") else ""
    text = f"{usable}" if usable == online else f"{usable} of {online}"
    return text + (f" in {nodes} NUMA nodes" if nodes > 1 else "") + virtual


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{format_size(total)}, {format_size(available_memory_bytes())} available"


def _device(device: str) -> str:
    if device == "cpu":
        return ""
    # In a child: what has used a device cannot be forked any more.
    try:
        sample = run_forked(partial(_device_name, device), deadline_s=_DEVICE_DEADLINE_S)
    except SllmError as exc:
        raise DeviceUnavailable(str(exc), hint="run `sllmctl doctor`") from exc
    return f"{device}: {sample.check}"


def _device_name(device: str) -> Sample:
    import torch

    spec = find_device(device)
    return Sample(0.0, check=getattr(torch, spec.kind).get_device_name(spec.ordinal))


def _pages() -> str:
    base = "/sys/kernel/mm/transparent_hugepage"
    parts = [f"{resource.getpagesize()} bytes"]
    if size := _read(f"{base}/hpage_pmd_size").strip():
        parts.append(f"huge {format_size(int(size))}")
    for name in ("enabled", "shmem_enabled"):
        if "[" in (text := _read(f"{base}/{name}")):
            parts.append(f"{name} {text.partition('[')[2].partition(']')[0]}")
    return ", ".join(parts)


def _filesystem(path: Path) -> str:
    """Type and options of the mount that a path is on. Source: proc_pid_mountinfo(5)."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in _read("/proc/self/mountinfo").splitlines():
        fields = line.split()
        if fields[2] == number:
            kind, source, options = fields[fields.index("-") + 1 :][:3]
            return f"{kind} on {source} ({options})"
    return ""


def _disk(path: Path) -> str:
    device = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not block.exists():
        return ""
    block = block.resolve()
    if (block / "partition").exists():
        block = block.parent
    model = _read(block / "device/model").strip() or _read(block / "device/vendor").strip()
    parts = [f"{block.name} {model}".strip()]
    if size := _read(block / "size").strip():
        parts.append(format_size(512 * int(size)))
    queue = block / "queue"
    parts += [
        f"{name} {value}"
        for name in ("rotational", "scheduler", "nr_requests", "read_ahead_kb")
        if (value := _read(queue / name).strip())
    ]
    return ", ".join(parts)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""

"""IO: the disk that checkpoints are to live on."""

from __future__ import annotations

import os
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
from sllmctl.doctor.checks.hub import hub_cache
from sllmctl.doctor.host import UNLIMITED
from sllmctl.doctor.machine import Machine

_GIB = 1 << 30
_OPEN_FILES = 4096
_SLOW = ("nfs", "cifs", "smb3", "fuse", "overlay", "9p", "ceph", "squashfs")
_MEMORY = ("tmpfs", "ramfs")


def storage(m: Machine) -> str | None:
    """The storage path, or the nearest directory above it that is there."""
    return m.nearest(m.storage_path)


def mount_of(m: Machine, path: str) -> tuple[str, str]:
    """Type and device number ("8:1") of the file system that a path lies on; "" if not known."""
    real, best, kind, number = m.probe.realpath(path), "", "", ""
    for line in (m.probe.read_text("/proc/self/mountinfo", 1 << 20) or "").splitlines():
        left, mark, right = line.partition(" - ")
        fields, types = left.split(), right.split()
        if not mark or len(fields) < 5 or not types:
            continue
        point = fields[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind, number = point, types[0], fields[2]
    return kind, number


def _turns(m: Machine, number: str) -> bool:
    """Whether the disk of a device number is one that turns; a partition asks its disk."""
    if re.search(r"/(virtio\d*|virtual|vbd-\d+)/", m.probe.realpath(f"/sys/dev/block/{number}")):
        return False  # a virtual disk says that it turns, whatever lies behind it
    places = (f"/sys/dev/block/{number}/queue", f"/sys/dev/block/{number}/../queue")
    said = [m.probe.read_text(f"{place}/rotational") for place in places]
    return next((text.strip() == "1" for text in said if text), False)


@check(
    "IO001",
    title="there is room for checkpoints",
    why="a conversion needs the room of its result, beside the download",
    looks_at="free bytes and inodes of the storage path, with --model its size; free bytes of the "
    "hub's cache, /tmp and ~/ascend/log",
    profiles="base convert",
)
def room(m: Machine) -> Finding:
    path = storage(m)
    space = m.probe.space(path) if path else None
    if path is None or space is None or not space.total_bytes:
        return skip(say("how much room is left is not known"))
    seen = limit(path, f"{space.free_bytes} of {space.total_bytes} bytes free")
    need = m.model_bytes
    if space.free_bytes < max(need, _GIB):
        return fail(
            say("{path} has only {free} MB left", path=path, free=space.free_bytes >> 20),
            seen,
            advice=say("make room, or choose another disk with --storage-path"),
        )
    if space.total_inodes and space.free_inodes < 1000:
        return fail(
            say("{path} has no inodes left", path=path),
            limit(path, f"{space.free_inodes} inodes"),
            advice=say("make room, or choose another disk with --storage-path"),
        )
    if space.free_bytes < min(0.1 * space.total_bytes, 50 * _GIB):
        return warn(
            say("{path} is nearly full: {free} MB left", path=path, free=space.free_bytes >> 20),
            seen,
            advice=say("make room, or choose another disk with --storage-path"),
        )
    for other in (hub_cache(m), "/tmp", f"{m.probe.host.home}/ascend/log"):
        place = m.nearest(other)
        left = m.probe.space(place) if place else None
        if place and left and left.free_bytes < _GIB:
            return warn(
                say("{path} is nearly full: {free} MB left",
                    path=place, free=left.free_bytes >> 20),
                limit(place, f"{left.free_bytes} of {left.total_bytes} bytes free"),
                advice=say("make room there"),
            )  # fmt: skip
    return ok(say("{path} has {free} GB left", path=path, free=space.free_bytes // 10**9), seen)


@check(
    "IO002",
    title="files can be read past the page cache (O_DIRECT)",
    why="sllm-store's reader fails without it (errno 22); sllmctl falls back by itself",
    looks_at="a 4 KiB file in the storage path, read with O_DIRECT and removed",
    profiles="base convert store",
)
def direct(m: Machine) -> Finding:
    path = storage(m)
    able = m.probe.direct_io(path) if path else None
    if path is None or able is None:
        return skip(say("O_DIRECT could not be tried"))
    if able:
        return ok(say("{path} supports O_DIRECT", path=path), file(path))
    made = fail if "store" in m.profiles else info
    return made(
        say("{path} does not support O_DIRECT", path=path),
        file(path, mount_of(m, path)[0]),
        advice=say("move the checkpoints to ext4 or xfs"),
    )


@check(
    "IO003",
    title="checkpoints lie on a fast file system",
    why="network and layered file systems are slow; one in memory takes what the model needs",
    looks_at="the type of the storage path's file system in /proc/self/mountinfo, and whether its "
    "disk spins",
    severity=Status.WARN,
    profiles="base convert store",
)
def file_system(m: Machine) -> Finding:
    path = storage(m)
    kind, number = mount_of(m, path) if path else ("", "")
    if not path or not kind:
        return skip(say("the type of the file system is not known"))
    if kind in _MEMORY:
        return info(say("{path} is in memory ({kind})", path=path, kind=kind), file(path, kind))
    if kind.startswith(_SLOW):
        made = warn if "store" in m.profiles else info
        return made(
            say("{path} is on {kind}, which may be slow", path=path, kind=kind),
            file(path, kind),
            advice=say("put checkpoints on a local disk, by --storage-path"),
        )
    if _turns(m, number):
        return info(
            say("{path} is on a spinning disk", path=path),
            file(f"/sys/dev/block/{number}", "rotational"),
            advice=say("put checkpoints on a local disk, by --storage-path"),
        )
    return ok(say("{path} is on {kind}", path=path, kind=kind), file(path, kind))


@check(
    "IO004",
    title="this user may write checkpoints",
    why="a conversion writes below the storage path; engines open many files at once",
    looks_at="write access to the storage path, the limit of open files, and the umask",
    severity=Status.WARN,
    profiles="base convert",
)
def writable(m: Machine) -> Finding:
    path = storage(m)
    if path is None:
        return skip(say("how much room is left is not known"))
    if not m.probe.may(path, os.W_OK | os.X_OK):
        return warn(
            say("this user may not write to {path}", path=path),
            file(path, "no access"),
            advice=say("choose another directory with --storage-path"),
        )
    files = m.probe.host.open_files
    # sllmctl raises its own limit; engines and sllm-store do not.
    engines = {"store", "vllm", "sglang"} & set(m.profiles)
    if engines and files != UNLIMITED and files < _OPEN_FILES:
        return warn(
            say("only {count} files may be open at once", count=files),
            limit("RLIMIT_NOFILE", files),
            fix="docker run --ulimit nofile=65536 ..." if m.in_container else "ulimit -n 65536",
        )
    mask = re.search(r"^Umask:\s*([0-7]{1,4})$", m.probe.read_text("/proc/self/status") or "", re.M)
    if mask and int(mask[1], 8) & 0o44:
        return info(
            say("files of this user cannot be read by others (umask {mask})", mask=mask[1]),
            limit("umask", mask[1]),
            fix="umask 022  # before a conversion, if a store of another user is to read it",
        )
    return ok(say("{path} can be written", path=path), file(path))

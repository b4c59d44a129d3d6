"""IO: the disk that checkpoints are to live on."""

from __future__ import annotations

import os
import posixpath

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
from sllmctl.doctor.machine import Machine

_GIB = 1 << 30
_SLOW = ("nfs", "cifs", "smb3", "fuse", "overlay", "9p", "ceph", "squashfs")
_MEMORY = ("tmpfs", "ramfs")


def storage(m: Machine) -> str | None:
    """The storage path, or the nearest directory above it that is there."""
    given = (
        m.options.storage_path
        or m.env.get("SLLMCTL_STORAGE_PATH")
        or m.env.get("STORAGE_PATH")
        or "models"
    )
    path = posixpath.normpath(posixpath.join(m.probe.host.cwd, given))
    while not m.probe.is_dir(path):
        if path == "/":
            return None
        path = posixpath.dirname(path)
    return path


def kind_of(m: Machine, path: str) -> str:
    """Type of the file system that a path lies on, or ""."""
    real, best, kind = m.probe.realpath(path), "", ""
    for line in (m.probe.read_text("/proc/self/mountinfo", 1 << 20) or "").splitlines():
        left, mark, right = line.partition(" - ")
        fields, types = left.split(), right.split()
        if not mark or len(fields) < 5 or not types:
            continue
        point = fields[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, types[0]
    return kind


@check(
    "IO001",
    title="there is room for checkpoints",
    why="a conversion needs the room of its result, beside the download",
    looks_at="free bytes and inodes of the storage path; with --model its size",
    profiles="base convert",
)
def room(m: Machine) -> Finding:
    path = storage(m)
    space = m.probe.space(path) if path else None
    if path is None or space is None:
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
        return ok(say("{path} knows O_DIRECT", path=path), file(path))
    made = fail if "store" in m.profiles else info
    return made(
        say("{path} does not know O_DIRECT", path=path),
        file(path, kind_of(m, path)),
        advice=say("move the checkpoints to ext4 or xfs"),
    )


@check(
    "IO003",
    title="checkpoints lie on a fast file system",
    why="network and layered file systems are slow; one in memory takes what the model needs",
    looks_at="the type of the storage path's file system in /proc/self/mountinfo",
    severity=Status.WARN,
    profiles="base convert store",
)
def file_system(m: Machine) -> Finding:
    path = storage(m)
    kind = kind_of(m, path) if path else ""
    if not path or not kind:
        return skip(say("the type of the file system is not known"))
    if kind in _MEMORY:
        return info(say("{path} lies in memory ({kind})", path=path, kind=kind), file(path, kind))
    if kind.startswith(_SLOW):
        made = warn if "store" in m.profiles else info
        return made(
            say("{path} lies on {kind}, which may be slow", path=path, kind=kind),
            file(path, kind),
            advice=say("put checkpoints on a local disk, by --storage-path"),
        )
    return ok(say("{path} lies on {kind}", path=path, kind=kind), file(path, kind))


@check(
    "IO004",
    title="this user may write checkpoints",
    why="a conversion writes below the storage path",
    looks_at="write access to the storage path",
    severity=Status.WARN,
    profiles="base convert",
)
def writable(m: Machine) -> Finding:
    path = storage(m)
    if path is None:
        return skip(say("how much room is left is not known"))
    if m.probe.may(path, os.W_OK | os.X_OK):
        return ok(say("{path} can be written", path=path), file(path))
    return warn(
        say("this user may not write to {path}", path=path),
        file(path, "no access"),
        advice=say("choose another directory with --storage-path"),
    )

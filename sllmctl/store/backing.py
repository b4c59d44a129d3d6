"""What segments are made of: memory files, with huge pages where the system has them for us."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sllmctl.errors import SllmError
from sllmctl.native import Segment

log = logging.getLogger(__name__)
PAGE_BYTES = os.sysconf("SC_PAGESIZE")
HUGE_BYTES = 2 * 2**20
_CLONE_NEWNS = 0x20000
_CAP_IPC_LOCK = 14
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_RDONLY = 2, 4, 8, 1
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_PLAIN_FLAGS = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Backing:
    """Where segments come from.

    Attributes:
        kind: ``memfd`` or ``tmpfs``.
        page_bytes: Size of their pages, as the first segment got them.
        make: Makes one of so many bytes.
    """

    kind: str
    page_bytes: int
    make: Callable[[int], Segment]


def memory_files(pool_bytes: int, segment_bytes: int) -> Backing:
    """Memory files, which the kernel gives huge pages or not."""
    return Backing("memfd", _page_bytes(Segment(segment_bytes)), Segment)


def choose_backing(pool_bytes: int, segment_bytes: int) -> Backing:
    """Memory files if they get huge pages; else files of a tmpfs if those do; else memory files.

    Huge pages take six tenths of the time to supply, and a client that maps them two thirds of the
    time for its first look at every byte, and next to none to unmap them.
    """
    memory = memory_files(pool_bytes, segment_bytes)
    if memory.page_bytes >= HUGE_BYTES:
        return memory
    try:
        directories = _mount_huge_tmpfs(pool_bytes)
        first = Segment(segment_bytes, directories)
        page_bytes = _page_bytes(first)
    except (OSError, SllmError) as exc:
        log.info("no tmpfs with huge pages: %s", exc)
        return memory
    if page_bytes < HUGE_BYTES or not first.recyclable:
        return memory
    return Backing("tmpfs", page_bytes, lambda nbytes: Segment(nbytes, directories))


def _page_bytes(segment: Segment) -> int:
    """The size of a segment's pages. Source: proc(5), ``ShmemPmdMapped`` of smaps."""
    segment.prefault(0, HUGE_BYTES)
    ours = False
    with Path("/proc/self/smaps").open(encoding="ascii", errors="replace") as maps:
        for line in maps:
            word, _, rest = line.partition(" ")
            if "-" in word:
                start, _, end = word.partition("-")
                ours = int(start, 16) <= segment.address < int(end, 16)
            elif ours and word == "ShmemPmdMapped:":
                return HUGE_BYTES if int(rest.split()[0]) * 1024 >= HUGE_BYTES else PAGE_BYTES
    return PAGE_BYTES


def _mount_huge_tmpfs(nbytes: int) -> tuple[int, int]:
    """Mount a tmpfs with huge pages that no other process can find.

    A thread mounts it in a mount namespace of its own, which ends with the thread; the mounts
    live as long as the descriptors.

    Returns:
        Its directory for writing, and the same in a read-only mount.

    Raises:
        OSError: The process may not, or the kernel has no huge pages for it.
    """
    opened: list[int] = []
    failures: list[OSError] = []

    def mount() -> None:
        options = f"huge=always,mode=0700,size={nbytes}".encode()
        at = os.fsencode(tempfile.gettempdir())
        try:
            _check(_libc.unshare(_CLONE_NEWNS))
            _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
            _check(_libc.mount(b"tmpfs", at, b"tmpfs", _PLAIN_FLAGS, options))
            opened.append(os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            _check(_libc.mount(at, at, None, _MS_BIND, None))
            read_only = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _PLAIN_FLAGS
            _check(_libc.mount(None, at, None, read_only, None))
            opened.append(os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as exc:
            failures.append(exc)

    thread = threading.Thread(target=mount, name="sllm-mount")
    thread.start()
    thread.join()
    if failures:
        for fd in opened:
            os.close(fd)
        raise failures[0]
    writable, readable = opened
    return writable, readable


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def may_lock(nbytes: int) -> bool:
    """Whether this process may lock so much memory. Source: mlock(2), capabilities(7)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= nbytes:
        return True
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False

"""One load: threads of the native library that bring extents of files to their places."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sllmctl._native import ffi, lib
from sllmctl.native.calls import CLOSE_TIMEOUT_MS, WAIT_SLICE_MS, check, owned
from sllmctl.native.devices import Device, Registered, Ring


class Extent(NamedTuple):
    """A byte range of a file and the address of its first byte's place.

    ``device`` is -1 for host memory, else an index into the job's devices.
    """

    file: int
    offset: int
    nbytes: int
    target: int
    device: int = -1


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot of a job; bytes, and seconds since its start."""

    bytes_total: int
    bytes_disk: int
    bytes_cache: int
    bytes_done: int
    chunks_done: int
    read_s: float
    copy_s: float


class Job:
    """One load: threads that bring extents of files into host memory and onto devices.

    Args:
        files: Descriptor and name of each file; the descriptors stay open until `close`.
        extents: What to read, and where to.
        keep: What the extents point into: kept for as long as a thread may write there.
        chunk_bytes: Largest read, a multiple of 4096; 0 for the library's own choice.
        threads: Readers; 0 for the library's own choice.
        direct: Whether reads may go around the page cache.
        mapped: Whether each target is where `Memory.map_file` mapped the extent itself: it is
            brought into the page cache and the mapping, and nothing is copied.
        registered: Of each file, in the same order, where devices copy from instead of from the
            ring; None, or nothing at all, for the ring.
        devices: What ``Extent.device`` counts; none for a load into host memory alone.
        ring: Staging slots of at least ``chunk_bytes`` and a page; needed for devices, and used
            by one job at a time.

    Raises:
        NativeError: An extent is impossible; `ReadError` where its file is too short.
    """

    __slots__ = ("__weakref__", "_end", "_ended", "_handle", "_hung", "_lock", "_out")

    def __init__(
        self,
        files: Sequence[tuple[int, str]],
        extents: Sequence[Extent],
        *,
        keep: object,
        chunk_bytes: int = 0,
        threads: int = 0,
        direct: bool = True,
        mapped: bool = False,
        registered: Sequence[Registered | None] = (),
        devices: Sequence[Device] = (),
        ring: Ring | None = None,
    ) -> None:
        paths = [ffi.new("char[]", os.fsencode(path)) for _, path in files]
        c_files = ffi.new(
            "sllm_file[]", [(fd, 0, path) for (fd, _), path in zip(files, paths, strict=True)]
        )
        for number, one in enumerate(registered):
            c_files[number].registered = ffi.NULL if one is None else one._handle
        c_extents = ffi.new(
            "sllm_extent[]", [(e.file, e.device, e.offset, e.nbytes, e.target) for e in extents]
        )
        options = ffi.new("sllm_job_options *")
        options.size = ffi.sizeof("sllm_job_options")
        options.chunk_bytes = chunk_bytes
        options.threads = threads
        options.flags = 0 if direct else lib.SLLM_JOB_NO_DIRECT
        options.flags |= lib.SLLM_JOB_MAPPED if mapped else 0
        c_devices = ffi.new("sllm_device *[]", [device._handle for device in devices])
        options.devices, options.device_count = c_devices, len(devices)
        options.ring = ffi.NULL if ring is None else ring._handle
        out, error = owned("sllm_job", _close), ffi.new("sllm_error *")
        check(
            lib.sllm_job_create(c_files, len(files), c_extents, len(extents), options, out, error),
            error,
        )
        self._handle = out[0]
        self._out = out
        # The interpreter may end the job while a daemon thread waits for it.
        self._lock = threading.RLock()
        self._ended: bool | None = None
        self._hung: Any = None
        # Also at exit, before the interpreter takes from under the threads what they write to.
        _kept[_address(self._handle)] = keep
        self._end = weakref.finalize(self, _end_job, out, self._lock)
        check(lib.sllm_job_start(self._handle, error), error)

    def wait(self, timeout_ms: int | None = None) -> tuple[bool, Progress]:
        """Wait for the end, for at most ``timeout_ms`` or 200 ms.

        Returns:
            Whether every byte is in its place, and how far things are.

        Raises:
            ReadError: A file cannot be read, is too short, or changed meanwhile.
            NativeError: Nothing moved for a minute, or the job has been ended.
        """
        progress, error = ffi.new("sllm_progress *"), ffi.new("sllm_error *")
        timeout_ms = WAIT_SLICE_MS if timeout_ms is None else timeout_ms
        with self._lock:
            status = lib.sllm_job_wait(self._out[0], timeout_ms, progress, error)
        if status != lib.SLLM_E_BUSY:
            check(status, error)
        return status == lib.SLLM_OK, Progress(
            progress.bytes_total,
            progress.bytes_disk,
            progress.bytes_cache,
            progress.bytes_done,
            progress.chunks_done,
            progress.read_s,
            progress.copy_s,
        )

    def chunks_done(self, first: int, count: int) -> bytes:
        """One byte a chunk, in file order: 1 when it is in its place."""
        done, error = ffi.new("uint8_t[]", count), ffi.new("sllm_error *")
        with self._lock:
            status = lib.sllm_job_chunks_done(self._out[0], first, count, done, error)
        check(status, error)
        return bytes(ffi.buffer(done, count))

    def close(self) -> bool:
        """Stop what runs and end the job, within 0.3 s.

        A thread that sits in a read which does not return keeps the job and its memory: they
        stay until the process ends, for the thread may still write there.

        Returns:
            Whether it ended. If not, nobody may use the memory for anything else, or close the
            files, before `ended` says so.
        """
        handle, self._handle = self._handle, ffi.NULL
        if self._ended is None:
            self._ended = False  # also after a Ctrl-C, when nobody knows
            self._ended = self._end() is not False
            self._hung = None if self._ended else handle
        return self._ended

    def ended(self) -> bool:
        """Whether a job that was closed has ended by now; asks again, and does not wait."""
        hung, self._hung = self._hung, None
        if hung is not None:
            self._ended = _close(hung, 0)
            if self._ended:
                _kept.pop(_address(hung), None)
            else:
                self._hung = hung
        return self._ended is True

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_LOCK_TIMEOUT_S = 1.0

_kept: dict[int, object] = {}
"""What jobs write to, by their handles' addresses, until a job has ended for certain: a hung read
leaves it here until it returns, a Ctrl-C before the answer for ever."""


def _address(handle: Any) -> int:
    return int(ffi.cast("uintptr_t", handle))


def _close(handle: Any, timeout_ms: int = CLOSE_TIMEOUT_MS) -> bool:
    return bool(lib.sllm_job_close(handle, timeout_ms, ffi.NULL) == lib.SLLM_OK)


def _end_job(out: Any, lock: threading.RLock) -> bool:
    lib.sllm_job_cancel(out[0])  # whoever waits for it returns at once
    if not lock.acquire(timeout=_LOCK_TIMEOUT_S):
        return False  # a forked child has the lock of a thread that it has not
    try:
        handle, out[0] = out[0], ffi.NULL
    finally:
        lock.release()
    if not _close(handle):
        return False
    _kept.pop(_address(handle), None)
    return True

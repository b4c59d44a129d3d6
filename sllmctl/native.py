"""The native library as Python types. The only importer of ``_native``.

Handles end when the last reference goes; what a failing call says becomes an exception of
``errors.py``. Every blocking call returns within 200 ms, so that Ctrl-C is answered.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sllmctl import errors
from sllmctl._native import ffi, lib

WAIT_SLICE_MS = 200
CLOSE_TIMEOUT_MS = 300
PAGE_BYTES = 4096

_EXCEPTIONS: dict[int, type[errors.NativeError]] = {
    lib.SLLM_E_INVALID: errors.NativeError,
    lib.SLLM_E_NOMEM: errors.HostMemoryError,
    lib.SLLM_E_IO: errors.ReadError,
    lib.SLLM_E_TRUNCATED: errors.ReadError,
    lib.SLLM_E_CHANGED: errors.ReadError,
    lib.SLLM_E_CANCELLED: errors.NativeError,
    lib.SLLM_E_TIMEOUT: errors.NativeError,
    lib.SLLM_E_NO_DEVICE: errors.DeviceUnavailable,
    lib.SLLM_E_DEVICE: errors.DeviceError,
    lib.SLLM_E_UNSUPPORTED: errors.NativeError,
    lib.SLLM_E_FORKED: errors.NativeError,
    lib.SLLM_E_BUSY: errors.NativeError,
}

_HINTS: dict[int, str] = {
    lib.SLLM_E_IO: "run `sllmctl verify` on the checkpoint to find every damaged shard",
    lib.SLLM_E_TRUNCATED: "the file is shorter than its header says: copy or convert it again",
    lib.SLLM_E_CHANGED: "replace checkpoints by rename, never in place, and load again",
    lib.SLLM_E_NOMEM: "free some memory, or raise the limit of the process or its container",
    lib.SLLM_E_NO_DEVICE: "run `sllmctl doctor`: it says what a device lacks here",
    lib.SLLM_E_DEVICE: "run `sllmctl doctor`: it looks at device, driver and runtime library",
    lib.SLLM_E_FORKED: "start worker processes with `spawn`, and open devices in them",
    lib.SLLM_E_TIMEOUT: "the disk or its server does not answer: look at `dmesg` and the mount",
}


def _check(status: int, error: Any) -> None:
    if status == lib.SLLM_OK:
        return
    kind = _EXCEPTIONS.get(status, errors.NativeError)
    exc = kind(
        ffi.string(error.message).decode("utf-8", "replace"),
        hint=_HINTS.get(status),
        status=status,
        os_errno=error.os_errno,
        device_code=error.device_code,
    )
    if isinstance(exc, OSError):
        exc.errno = error.os_errno or None
    raise exc


class Memory:
    """Host memory that tensors look into. It ends with the last object that refers to it.

    Attributes:
        nbytes: Length in bytes.
        writable: False only for a view of a file under strict overcommit.
        buffer: A writable buffer of all bytes. Whatever keeps it, keeps the memory.
    """

    __slots__ = ("_handle", "address", "buffer", "nbytes", "writable")

    def __init__(self, handle: Any, lease: object = None) -> None:
        self._handle = handle
        self.nbytes: int = lib.sllm_memory_bytes(handle)
        self.writable: bool = bool(lib.sllm_memory_writable(handle))
        address = lib.sllm_memory_address(handle)
        self.address = int(ffi.cast("uintptr_t", address))
        # The finalizer sits on the pointer that the buffer keeps alive: tensors keep the buffer.
        # It needs no global name, so it may run at any point of interpreter exit.
        # What it holds besides ends after the mapping: a store's lease, say.
        owner = ffi.gc(
            ffi.cast("char *", address),
            lambda _, destroy=lib.sllm_memory_destroy, handle=handle, lease=lease: destroy(handle),
            self.nbytes,
        )
        self.buffer: Any = ffi.buffer(owner, self.nbytes)

    @classmethod
    def create(cls, nbytes: int, file_offset: int = 0, *, lease: object = None) -> Memory:
        """Fresh zeroed memory for a byte range of a file, placed for direct reads.

        Args:
            nbytes: Length, at least 1.
            file_offset: Where the range starts in its file.
            lease: Kept for as long as the memory is.

        Raises:
            HostMemoryError: The address space or the memory cannot be had.
        """
        out, error = ffi.new("sllm_memory **"), ffi.new("sllm_error *")
        _check(lib.sllm_memory_create(nbytes, file_offset, out, error), error)
        return cls(out[0], lease)

    def place(self, offset: int, fd: int, nbytes: int) -> None:
        """Map a private view of a segment's first bytes over a part of this memory.

        Raises:
            HostMemoryError: The address space cannot be had; the memory must not be used any more.
        """
        error = ffi.new("sllm_error *")
        _check(lib.sllm_memory_place(self._handle, offset, fd, 0, nbytes, error), error)

    @classmethod
    def map_file(cls, fd: int, path: str, file_offset: int, nbytes: int) -> Memory:
        """A private copy-on-write view of a byte range of a file. Nothing is read or copied.

        Raises:
            ReadError: The file ends before the range does, or cannot be mapped.
            HostMemoryError: The address space cannot be had.
        """
        out, error = ffi.new("sllm_memory **"), ffi.new("sllm_error *")
        _check(
            lib.sllm_memory_map(fd, os.fsencode(path), file_offset, nbytes, out, error),
            error,
        )
        return cls(out[0])


class Segment:
    """A memory file that only this process can write; it ends with its last reference.

    Args:
        nbytes: Its size, a multiple of 2 MiB.
        directories: Descriptors of a directory of a tmpfs, and of the same in a read-only mount,
            to make it there.
        as_before: A kernel version to behave as; for tests.

    Attributes:
        nbytes: Its size.
        address: Where to write.

    Raises:
        HostMemoryError: The memory cannot be had.
        NativeError: The second directory is not read-only.
    """

    __slots__ = ("_handle", "address", "nbytes")

    def __init__(
        self,
        nbytes: int,
        directories: tuple[int, int] | None = None,
        *,
        as_before: tuple[int, int] | None = None,
    ) -> None:
        out, error = ffi.new("sllm_segment **"), ffi.new("sllm_error *")
        if directories is not None:
            status = lib.sllm_segment_create_in(*directories, nbytes, out, error)
        else:
            flags = lib.SLLM_SEGMENT_NO_LEASE if as_before and as_before <= (5, 3) else 0
            if as_before and as_before <= (5, 1):
                flags |= lib.SLLM_SEGMENT_SEAL_WHEN_FULL
            status = lib.sllm_segment_create(nbytes, flags, out, error)
        _check(status, error)
        self._handle = ffi.gc(out[0], lib.sllm_segment_destroy, nbytes)
        self.nbytes = nbytes
        self.address = int(ffi.cast("uintptr_t", lib.sllm_segment_address(self._handle)))

    @property
    def recyclable(self) -> bool:
        """Whether the kernel can tell when nobody holds it any more."""
        return bool(lib.sllm_segment_flags(self._handle) & lib.SLLM_SEGMENT_RECYCLABLE)

    @property
    def locked(self) -> bool:
        """Whether all of it is locked in memory."""
        return bool(lib.sllm_segment_flags(self._handle) & lib.SLLM_SEGMENT_LOCKED)

    @property
    def held(self) -> bool:
        """Whether anybody else has a descriptor or a mapping of it."""
        return bool(lib.sllm_segment_held(self._handle))

    def prefault(self, offset: int, nbytes: int) -> None:
        """Supply the pages of a range, and lock them where the process may.

        Raises:
            HostMemoryError: The machine has no memory left.
        """
        error = ffi.new("sllm_error *")
        _check(lib.sllm_segment_prefault(self._handle, offset, nbytes, error), error)

    def complete(self) -> None:
        """Say that it is full: nothing is written to it any more, unless it is used anew.

        Raises:
            NativeError: The kernel cannot seal memory.
        """
        error = ffi.new("sllm_error *")
        _check(lib.sllm_segment_complete(self._handle, error), error)

    def reader(self) -> int:
        """A new read-only descriptor of a complete segment; the caller closes it."""
        out, error = ffi.new("int *"), ffi.new("sllm_error *")
        _check(lib.sllm_segment_reader(self._handle, out, error), error)
        return int(out[0])

    def close(self) -> None:
        """Unmap and close now; the memory ends when nobody holds it any more."""
        handle, self._handle = self._handle, None
        if handle is not None:
            ffi.release(handle)


class FileFacts(NamedTuple):
    """What the page cache and the filesystem say about a byte range of a file."""

    size_bytes: int
    resident_bytes: int
    local: bool
    residency_known: bool


def probe_file(fd: int, path: str, file_offset: int, nbytes: int) -> FileFacts:
    """Ask how much of a range is in the page cache, without reading any of it."""
    out, error = ffi.new("sllm_file_facts *"), ffi.new("sllm_error *")
    _check(lib.sllm_file_probe(fd, os.fsencode(path), file_offset, nbytes, out, error), error)
    return FileFacts(out.size_bytes, out.resident_bytes, bool(out.local), bool(out.residency_known))


class Device:
    """A device that loads copy to. It ends with the last ring and job that use it.

    Args:
        kind: A backend: "cpu", "npu" or "cuda".
        ordinal: Which of its devices, counted as the runtime counts those it may see.

    Raises:
        DeviceUnavailable: There is no such device, or its runtime library is missing.
        DeviceError: The runtime refused it.
    """

    __slots__ = ("_handle", "kind", "ordinal")

    def __init__(self, kind: str, ordinal: int = 0) -> None:
        out, error = ffi.new("sllm_device **"), ffi.new("sllm_error *")
        _check(lib.sllm_device_open(kind.encode(), ordinal, out, error), error)
        self._handle = ffi.gc(out[0], lib.sllm_device_close)
        self.kind = kind
        self.ordinal = ordinal

    def close(self) -> None:
        """Give the device back; what still uses it keeps it for as long."""
        self._handle = ffi.NULL

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Ring:
    """Staging slots between files and a device, pinned where the backend pins.

    One job at a time uses a ring, and one after the other may: pinning takes time. It ends with
    the last job that uses it.

    Args:
        device: Whose copies the slots feed.
        slot_bytes: Size of one: a job's ``chunk_bytes`` and `PAGE_BYTES` more; a multiple of that.
        count: How many, 2 to 1024.

    Raises:
        HostMemoryError: The memory cannot be had, or not be pinned.
        DeviceError: The runtime refused.
    """

    __slots__ = ("_handle", "count", "slot_bytes")

    def __init__(self, device: Device, slot_bytes: int, count: int) -> None:
        out, error = ffi.new("sllm_ring **"), ffi.new("sllm_error *")
        _check(lib.sllm_ring_create(device._handle, slot_bytes, count, out, error), error)
        self._handle = ffi.gc(out[0], lib.sllm_ring_destroy, slot_bytes * count)
        self.slot_bytes = slot_bytes
        self.count = count

    def close(self) -> None:
        """Give the memory back; a job that still uses it keeps it for as long."""
        self._handle = ffi.NULL

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Gather:
    """Strided slices of host memory, copied to a device through a ring.

    What a tensor-parallel rank needs of a weight moves, and nothing else; and no memory but the
    ring's ever takes part in a device's copy. It works on the calling thread, which has the device
    as its current one, and never changes that.

    Args:
        device: Where the slices go.
        ring: Of the same backend; no job and no other gather uses it meanwhile.
        stream: The stream to copy on, as the runtime has it: torch's ``npu_stream`` or
            ``cuda_stream``. Copies come after the work that is in it, and before what comes later.
            0 for a stream of the gather's own.

    Raises:
        NativeError: The thread is on another device, or the ring of another backend.
        DeviceError: The runtime refused.
    """

    __slots__ = ("__weakref__", "_end", "_handle")

    def __init__(self, device: Device, ring: Ring, *, stream: int = 0) -> None:
        out, error = ffi.new("sllm_gather **"), ffi.new("sllm_error *")
        _check(lib.sllm_gather_open(device._handle, ring._handle, stream, out, error), error)
        self._handle = out[0]
        self._end = weakref.finalize(self, _end_gather, self._handle)

    def copy(
        self,
        target: int,
        source: int,
        *,
        rows: int,
        row_bytes: int,
        source_stride_bytes: int,
        timeout_s: float = 60,
    ) -> None:
        """Start the copy of a slice; rows lie without gaps on the device.

        Args:
            target: Device address of the first row.
            source: Host address of the first row; free again when this returns.
            rows: How many.
            row_bytes: Length of each.
            source_stride_bytes: From one row's start to the next one's.
            timeout_s: Without a free slot for so long, the device has stalled.

        Raises:
            DeviceError: The runtime refused, or stalled.
            NativeError: It is no slice.
        """
        error = ffi.new("sllm_error *")
        address = ffi.cast("void *", source)
        _wait_in_slices(
            lambda timeout_ms: lib.sllm_gather_copy(
                self._handle,
                target,
                address,
                rows,
                row_bytes,
                source_stride_bytes,
                timeout_ms,
                error,
            ),
            timeout_s,
            error,
        )

    def synchronize(self, timeout_s: float = 60) -> None:
        """Wait until every slice is on the device.

        Raises:
            DeviceError: A copy failed, or the device has stalled for ``timeout_s``.
        """
        error = ffi.new("sllm_error *")
        _wait_in_slices(
            lambda timeout_ms: lib.sllm_gather_synchronize(self._handle, timeout_ms, error),
            timeout_s,
            error,
        )

    def close(self) -> bool:
        """End it, after the copies under way.

        Returns:
            Whether it ended within 0.3 s. If not, the ring stays until the process ends.
        """
        ended = self._end()
        self._handle = ffi.NULL
        return ended is not False

    def __enter__(self) -> Gather:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_gather(handle: Any) -> bool:
    return bool(lib.sllm_gather_close(handle, CLOSE_TIMEOUT_MS, ffi.NULL) == lib.SLLM_OK)


def _wait_in_slices(call: Callable[[int], int], timeout_s: float, error: Any) -> None:
    """Repeat a call that answers "not yet", so that Ctrl-C is answered between."""
    deadline = time.monotonic() + timeout_s
    status = lib.SLLM_E_BUSY
    while status == lib.SLLM_E_BUSY:
        left_ms = int((deadline - time.monotonic()) * 1000)
        if left_ms < 0:
            raise errors.DeviceError(
                f"the device has not copied anything for {timeout_s:g} s",
                hint=_HINTS[lib.SLLM_E_DEVICE],
                status=lib.SLLM_E_TIMEOUT,
            )
        status = call(min(left_ms, WAIT_SLICE_MS))
    _check(status, error)


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
        devices: What ``Extent.device`` counts; none for a load into host memory alone.
        ring: Staging slots of at least ``chunk_bytes`` and a page; needed for devices, and used
            by one job at a time.

    Raises:
        NativeError: An extent is impossible; `ReadError` where its file is too short.
    """

    __slots__ = ("__weakref__", "_end", "_handle")

    def __init__(
        self,
        files: Sequence[tuple[int, str]],
        extents: Sequence[Extent],
        *,
        keep: object,
        chunk_bytes: int = 0,
        threads: int = 0,
        direct: bool = True,
        devices: Sequence[Device] = (),
        ring: Ring | None = None,
    ) -> None:
        paths = [ffi.new("char[]", os.fsencode(path)) for _, path in files]
        c_files = ffi.new(
            "sllm_file[]", [(fd, 0, path) for (fd, _), path in zip(files, paths, strict=True)]
        )
        c_extents = ffi.new(
            "sllm_extent[]", [(e.file, e.device, e.offset, e.nbytes, e.target) for e in extents]
        )
        options = ffi.new("sllm_job_options *")
        options.size = ffi.sizeof("sllm_job_options")
        options.chunk_bytes = chunk_bytes
        options.threads = threads
        options.flags = 0 if direct else lib.SLLM_JOB_NO_DIRECT
        c_devices = ffi.new("sllm_device *[]", [device._handle for device in devices])
        options.devices, options.device_count = c_devices, len(devices)
        options.ring = ffi.NULL if ring is None else ring._handle
        out, error = ffi.new("sllm_job **"), ffi.new("sllm_error *")
        _check(
            lib.sllm_job_create(c_files, len(files), c_extents, len(extents), options, out, error),
            error,
        )
        self._handle = out[0]
        # Also at exit, before the interpreter takes from under the threads what they write to.
        self._end = weakref.finalize(self, _end_job, self._handle, keep)
        _check(lib.sllm_job_start(self._handle, error), error)

    def wait(self, timeout_ms: int | None = None) -> tuple[bool, Progress]:
        """Wait for the end, for at most ``timeout_ms`` or 200 ms.

        Returns:
            Whether every byte is in its place, and how far things are.

        Raises:
            ReadError: A file cannot be read, is too short, or changed meanwhile.
            NativeError: Nothing moved for a minute.
        """
        progress, error = ffi.new("sllm_progress *"), ffi.new("sllm_error *")
        status = lib.sllm_job_wait(
            self._handle, WAIT_SLICE_MS if timeout_ms is None else timeout_ms, progress, error
        )
        if status != lib.SLLM_E_BUSY:
            _check(status, error)
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
        _check(lib.sllm_job_chunks_done(self._handle, first, count, done, error), error)
        return bytes(ffi.buffer(done, count))

    def close(self) -> bool:
        """Stop what runs and end the job, within 0.3 s.

        A thread that sits in a read which does not return keeps the job and its memory: they
        stay until the process ends, for the thread may still write there.

        Returns:
            Whether it ended. If not, nobody may use the memory for anything else, or close the
            files.
        """
        ended = self._end()
        self._handle = ffi.NULL
        return ended is not False

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_job(handle: Any, keep: object) -> bool:
    if lib.sllm_job_close(handle, CLOSE_TIMEOUT_MS, ffi.NULL) != lib.SLLM_OK:
        _stuck.append(keep)
        return False
    return True


_stuck: list[object] = []
"""Memory that a hung read may still write to: never freed."""


def abi_version() -> int:
    """The interface version that the library was compiled with."""
    return int(lib.sllm_abi_version())


def status_name(status: int) -> str:
    """The name of an ``SLLM_E_*`` code."""
    return ffi.string(lib.sllm_status_name(status)).decode()

"""Host memory: what tensors look into, the store's segments, and what a file has in the cache."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from sllmctl._native import ffi, lib
from sllmctl.native.calls import check, owned


class Memory:
    """Host memory that tensors look into. It ends with the last object that refers to it.

    Attributes:
        nbytes: Length in bytes.
        writable: False only for a view of a file under strict overcommit.
        buffer: A writable buffer of all bytes. Whatever keeps it, keeps the memory.
    """

    __slots__ = ("_handle", "address", "buffer", "nbytes", "writable")

    def __init__(self, out: Any, lease: object = None) -> None:
        self._handle = handle = out[0]
        self.nbytes: int = lib.sllm_memory_bytes(handle)
        self.writable: bool = bool(lib.sllm_memory_writable(handle))
        address = lib.sllm_memory_address(handle)
        self.address = int(ffi.cast("uintptr_t", address))
        # The finalizer sits on the pointer that the buffer keeps alive: tensors keep the buffer.
        # It needs no global name, so it may run at any point of interpreter exit.
        # What it holds besides ends after the mapping: a store's lease, say.
        owner = ffi.gc(
            ffi.cast("char *", address),
            lambda _, release=ffi.release, out=out, lease=lease: release(out),
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
        out = owned("sllm_memory", lib.sllm_memory_destroy)
        error = ffi.new("sllm_error *")
        check(lib.sllm_memory_create(nbytes, file_offset, out, error), error)
        return cls(out, lease)

    def place(self, offset: int, fd: int, nbytes: int) -> None:
        """Map a private view of a segment's first bytes over a part of this memory.

        Raises:
            HostMemoryError: The address space cannot be had; the memory must not be used any more.
        """
        error = ffi.new("sllm_error *")
        check(lib.sllm_memory_place(self._handle, offset, fd, 0, nbytes, error), error)

    @classmethod
    def map_file(cls, fd: int, path: str, file_offset: int, nbytes: int) -> Memory:
        """A private copy-on-write view of a byte range of a file. Nothing is read or copied.

        Raises:
            ReadError: The file ends before the range does, or cannot be mapped.
            HostMemoryError: The address space cannot be had.
        """
        out = owned("sllm_memory", lib.sllm_memory_destroy)
        error = ffi.new("sllm_error *")
        check(
            lib.sllm_memory_map(fd, os.fsencode(path), file_offset, nbytes, out, error),
            error,
        )
        return cls(out)

    def advise_huge(self) -> bool:
        """Ask for huge pages in a view of a file, for what is read from now on.

        Returns:
            Whether the system takes the advice.
        """
        return bool(lib.sllm_memory_advise_huge(self._handle))

    def huge_bytes(self, offset: int, nbytes: int) -> int | None:
        """How much of a range lies in huge pages; None where the system does not tell."""
        huge = int(lib.sllm_memory_huge_bytes(self._handle, offset, nbytes))
        return None if huge < 0 else huge


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

    __slots__ = ("_handle", "_out", "address", "nbytes")

    def __init__(
        self,
        nbytes: int,
        directories: tuple[int, int] | None = None,
        *,
        as_before: tuple[int, int] | None = None,
    ) -> None:
        out = owned("sllm_segment", lib.sllm_segment_destroy, nbytes)
        error = ffi.new("sllm_error *")
        if directories is not None:
            status = lib.sllm_segment_create_in(*directories, nbytes, out, error)
        else:
            flags = lib.SLLM_SEGMENT_NO_LEASE if as_before and as_before <= (5, 3) else 0
            if as_before and as_before <= (5, 1):
                flags |= lib.SLLM_SEGMENT_SEAL_WHEN_FULL
            status = lib.sllm_segment_create(nbytes, flags, out, error)
        check(status, error)
        self._out, self._handle = out, out[0]
        self.nbytes = nbytes
        self.address = int(ffi.cast("uintptr_t", lib.sllm_segment_address(self._handle)))

    @property
    def recyclable(self) -> bool:
        """Whether the kernel can tell when nobody holds it any more."""
        return bool(lib.sllm_segment_flags(self._handle) & lib.SLLM_SEGMENT_RECYCLABLE)

    @property
    def locked(self) -> bool:
        """Whether its pages are locked in memory as they are supplied."""
        return bool(lib.sllm_segment_flags(self._handle) & lib.SLLM_SEGMENT_LOCKED)

    @property
    def held(self) -> bool:
        """Whether anybody else has a descriptor or a mapping of it."""
        return bool(lib.sllm_segment_held(self._handle))

    def prefault(self, offset: int, nbytes: int) -> None:
        """Supply the pages of a range.

        Raises:
            HostMemoryError: The machine has no memory left.
        """
        error = ffi.new("sllm_error *")
        check(lib.sllm_segment_prefault(self._handle, offset, nbytes, error), error)

    def complete(self) -> None:
        """Say that it is full: nothing is written to it any more, unless it is used anew.

        Raises:
            NativeError: The kernel cannot seal memory.
        """
        error = ffi.new("sllm_error *")
        check(lib.sllm_segment_complete(self._handle, error), error)

    def reader(self) -> int:
        """A new read-only descriptor of a complete segment; the caller closes it."""
        out, error = ffi.new("int *"), ffi.new("sllm_error *")
        check(lib.sllm_segment_reader(self._handle, out, error), error)
        return int(out[0])

    def close(self) -> None:
        """Unmap and close now; the memory ends when nobody holds it any more."""
        self._handle = None
        ffi.release(self._out)


class FileFacts(NamedTuple):
    """What the page cache and the filesystem say about a byte range of a file."""

    size_bytes: int
    resident_bytes: int
    local: bool
    residency_known: bool


def probe_file(fd: int, path: str, file_offset: int, nbytes: int) -> FileFacts:
    """Ask how much of a range is in the page cache, without reading any of it."""
    out, error = ffi.new("sllm_file_facts *"), ffi.new("sllm_error *")
    check(lib.sllm_file_probe(fd, os.fsencode(path), file_offset, nbytes, out, error), error)
    return FileFacts(out.size_bytes, out.resident_bytes, bool(out.local), bool(out.residency_known))

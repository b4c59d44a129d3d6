"""Reading files into page-aligned buffers, around the page cache where that pays."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

from sllmctl.core.header import MAX_HEADER_BYTES, shown
from sllmctl.errors import CheckpointError, ReadError
from sllmctl.native import PAGE_BYTES, Memory, probe_file

_DIRECT_MIN_BYTES = 2**20
_REFUSALS = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Of what may not be the regular file that it should be: opening a pipe would wait for a writer."""


class Buffer:
    """Page-aligned anonymous memory of ``nbytes``, and a page of slack behind it."""

    __slots__ = ("address", "nbytes", "view")

    def __init__(self, nbytes: int) -> None:
        memory = Memory.create(nbytes + PAGE_BYTES)  # huge pages: direct reads pin few of them
        self.nbytes = nbytes
        self.view = memoryview(memory.buffer)
        self.address = memory.address


class SourceFile:
    """A file open for positioned reads. Any thread may read.

    Large ranges that the page cache does not hold are read directly, so that a conversion neither
    waits for read-ahead nor pushes other files out of memory.

    Attributes:
        size: Size in bytes when it was opened.
    """

    def __init__(self, path: Path, *, bypass_cache: bool = False) -> None:
        """Open a file.

        Args:
            path: The file.
            bypass_cache: Read from the disk even what the page cache holds.

        Raises:
            ReadError: It cannot be opened, or is no regular file.
        """
        self.path = path
        self._bypass_cache = bypass_cache
        self._direct_fd = -1
        try:
            self._fd = os.open(path, _OPEN_FLAGS)
        except OSError as exc:
            raise _error(f"cannot open `{path}`", exc) from exc
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise ReadError(f"`{path}` is not a regular file")
        self.size = status.st_size
        with suppress(OSError):
            self._direct_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        self._direct = self._direct_fd >= 0
        if bypass_cache:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_into(self, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        """Fill ``nbytes`` of a buffer from ``position`` on; up to a page behind is overwritten.

        Raises:
            ReadError: The file ends before the range does, or the disk fails.
        """
        if nbytes < _DIRECT_MIN_BYTES and not self._bypass_cache:
            self._read_cached(offset, buffer, position, nbytes)
            return
        facts = probe_file(self._fd, str(self.path), offset, nbytes)
        resident = facts.resident_bytes >= nbytes // 2 and not self._bypass_cache
        if self._direct and not resident:
            try:
                self._read_direct(offset, buffer, position, nbytes)
                return
            except OSError as exc:
                if exc.errno not in _REFUSALS:
                    raise _error(f"cannot read `{self.path}` at byte {offset}", exc) from exc
                # Opened, but refused at the first read: some filesystems do that.
                self._direct = False
        self._read_cached(offset, buffer, position, nbytes)
        if not resident:
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _read_cached(self, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(
                    self._fd, [buffer.view[position + done : position + nbytes]], offset + done
                )
            except OSError as exc:
                raise _error(f"cannot read `{self.path}` at byte {offset + done}", exc) from exc
            if got == 0:
                raise self._too_short(offset + done, nbytes - done)
            done += got

    def _read_direct(self, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        skew = offset % PAGE_BYTES
        if skew == 0 and position % PAGE_BYTES == 0:
            self._read_pages(offset, buffer, position, nbytes)
            return
        scratch = thread_buffer("direct", skew + nbytes)
        self._read_pages(offset - skew, scratch, 0, skew + nbytes)
        # ctypes lets other threads run meanwhile; copying between memoryviews does not.
        ctypes.memmove(buffer.address + position, scratch.address + skew, nbytes)

    def _read_pages(self, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        span = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        done = 0
        while done < nbytes:
            got = os.preadv(
                self._direct_fd, [buffer.view[position + done : position + span]], offset + done
            )
            if got == 0:
                raise self._too_short(offset + done, nbytes - done)
            done += got
            if done < nbytes and done % PAGE_BYTES:
                self._read_cached(offset + done, buffer, position + done, nbytes - done)
                return

    def _too_short(self, offset: int, missing: int) -> ReadError:
        return ReadError(
            f"`{self.path}` ends at byte {offset}, and {missing} bytes more were expected",
            hint="it was truncated, or replaced while it was read",
        )

    def close(self) -> None:
        """Close the file. No read may be running."""
        os.close(self._fd)
        if self._direct_fd >= 0:
            os.close(self._direct_fd)


def read_file(path: Path, *, max_bytes: int = MAX_HEADER_BYTES) -> bytes:
    """Read a description whole: an index, a manifest, a configuration.

    Raises:
        CheckpointError: It cannot be read, is no regular file, or is larger than ``max_bytes``.
    """
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, _OPEN_FLAGS)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{shown(path)} is not a regular file")
            if status.st_size > max_bytes:
                raise CheckpointError(
                    f"{shown(path)} is {status.st_size} bytes long; the limit is {max_bytes}"
                )
            return file.read()
    except OSError as exc:
        raise CheckpointError(f"cannot read {shown(path)}: {errno_text(exc)}") from exc


def errno_text(exc: OSError) -> str:
    """Say what the system said: ``No space left on device (ENOSPC)``."""
    code = exc.errno or 0
    return f"{os.strerror(code)} ({errno.errorcode.get(code, code)})"


def _error(what: str, exc: OSError) -> ReadError:
    error = ReadError(f"{what}: {errno_text(exc)}", os_errno=exc.errno or 0)
    error.errno = exc.errno
    return error


class _Local(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Buffer] = {}


_local = _Local()


def thread_buffer(use: str, nbytes: int) -> Buffer:
    """Memory that this thread keeps for one use; what it held before is lost."""
    buffer = _local.buffers.get(use)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = _local.buffers[use] = Buffer(-(-nbytes // PAGE_BYTES) * PAGE_BYTES)
    return buffer

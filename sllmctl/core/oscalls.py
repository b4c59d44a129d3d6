"""System calls that Python's ``os`` lacks: each does its work, or says that it cannot."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}

_libc = ctypes.CDLL(None, use_errno=True)


def _find(name: str, *argument_types: Any) -> Callable[..., int] | None:
    function = getattr(_libc, name, None)
    if function is None:
        return None
    function.argtypes = argument_types
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


_fallocate = _find("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _find(
    "sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
_renameat2 = _find(
    "renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)


def preallocate(fd: int, size: int) -> bool:
    """Reserve disk space for a file of ``size`` bytes; False where the filesystem cannot.

    Not ``posix_fallocate``, which writes to every block where the filesystem cannot.

    Raises:
        OSError: The space is not there (ENOSPC, EDQUOT, EFBIG), or the disk fails.
    """
    if size == 0:
        return True
    if _fallocate is None:
        return False
    while _fallocate(fd, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to write a range of the page cache to disk now; it may decline."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where kernel or filesystem cannot.

    Raises:
        OSError: Either path is missing, or may not be renamed.
    """
    return _rename(one, other, _RENAME_EXCHANGE)


def rename_new(source: Path, target: Path) -> bool:
    """Rename unless something is at the target; False where kernel or filesystem cannot.

    Raises:
        FileExistsError: Something is at the target.
        OSError: The source is missing, or may not be renamed.
    """
    return _rename(source, target, _RENAME_NOREPLACE)


def _rename(source: Path, target: Path, flags: int) -> bool:
    if _renameat2 is None:
        return False
    names = os.fsencode(source), os.fsencode(target)
    if _renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; a filesystem that cannot is left alone."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)

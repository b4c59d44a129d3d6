"""Files in and out of the page cache, and proof of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from sllmctl.errors import SllmError
from sllmctl.native import probe_file

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
COLD_MAX_FRACTION = 0.01
HOT_MIN_FRACTION = 0.99
_TRIES = 3
_BLOCK_BYTES = 4 * 2**20


class PageCache:
    """Puts files out of the page cache or into it, and says afterwards how that was done."""

    def __init__(self) -> None:
        self.dropped_everything = False
        self._filled: set[Path] = set()  # by us, and not put out since

    @property
    def method(self) -> str:
        """How files were put out of the page cache."""
        return "drop_caches" if self.dropped_everything else "posix_fadvise(DONTNEED)"

    def make_cold(self, paths: Sequence[Path]) -> None:
        """Put files out of the page cache: each alone, and where that fails everything.

        Raises:
            SllmError: Some of them stay.
        """
        self._filled.difference_update(paths)
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                for number in range(_TRIES):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    if _resident_fraction(fd, path) <= COLD_MAX_FRACTION:
                        break
                    if number:
                        self._drop_everything()
                    time.sleep(0.05)  # pages that a process just let go of are not free at once
                else:
                    raise SllmError(f"`{path}` stays in the page cache: no cold figure can be had")
            finally:
                os.close(fd)

    def _drop_everything(self) -> None:
        try:
            DROP_CACHES.write_text("1")
        except OSError:
            return
        self.dropped_everything = True
        self._filled.clear()

    def make_hot(self, paths: Sequence[Path]) -> None:
        """Read files through the page cache, whole, until they are in it.

        A few pages that are missing would have to come from the disk, which takes longer than all
        of a load that maps the rest. Files that others brought there are put out first: what came
        by page faults lies there in small pieces, which take 20 times as long to map.

        Raises:
            SllmError: They do not stay there.
        """
        block = bytearray(_BLOCK_BYTES)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                if path not in self._filled:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    self._filled.add(path)
                for _ in range(_TRIES):
                    file.seek(0)
                    while file.readinto(block):
                        pass
                    if _resident_fraction(file.fileno(), path) >= HOT_MIN_FRACTION:
                        break
                else:
                    raise SllmError(f"`{path}` does not stay in the page cache: too little memory")


def _resident_fraction(fd: int, path: Path) -> float:
    size = os.fstat(fd).st_size
    facts = probe_file(fd, str(path), 0, size)
    if not facts.residency_known:
        raise SllmError(f"the system does not say how much of `{path}` is in the page cache")
    return facts.resident_bytes / max(size, 1)

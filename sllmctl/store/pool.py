"""The pool: a budget of memory in equal segments, and who has which."""

from __future__ import annotations

import ctypes
import threading

from sllmctl.core.units import format_size
from sllmctl.errors import ConfigError, HostMemoryError
from sllmctl.native import Segment

MIB = 2**20
MIN_SEGMENT_BYTES = 2 * MIB
MAX_SEGMENT_BYTES = 256 * MIB
_SEGMENTS_WANTED = 16
_PREFAULT_STEP_BYTES = 32 * MIB


def choose_segment_bytes(pool_bytes: int) -> int:
    """The largest power of two, 2 MiB to 256 MiB, of which the pool has at least 16."""
    wanted = max(pool_bytes // _SEGMENTS_WANTED, MIN_SEGMENT_BYTES)
    return min(MAX_SEGMENT_BYTES, 1 << (wanted.bit_length() - 1))


class Pool:
    """Segments that are free, given out, or orphaned: evicted, but still seen by some process.

    Never more than the budget exists at a time, orphans included. Calls are of one thread, but
    for `prefault`.
    """

    def __init__(self, pool_bytes: int, segment_bytes: int) -> None:
        if segment_bytes % MIN_SEGMENT_BYTES or segment_bytes <= 0:
            raise ConfigError(
                f"a segment of {format_size(segment_bytes)} is no multiple of 2 MiB",
                hint="write it like 256MiB",
            )
        self.segment_bytes = segment_bytes
        self.capacity = pool_bytes // segment_bytes
        if self.capacity == 0:
            raise ConfigError(
                f"a pool of {format_size(pool_bytes)} holds no segment of "
                f"{format_size(segment_bytes)}",
                hint="use a larger --mem-pool-size or a smaller --segment-size",
            )
        self._lock = threading.Lock()
        self._free: list[Segment] = []
        self._orphans: list[Segment] = []
        self._made = 0
        self._warm: set[Segment] = set()  # those whose pages are all there
        self._used: set[Segment] = set()  # those that held a model before
        self.prefaulted_bytes = 0

    @property
    def bytes(self) -> int:
        """The whole budget, in whole segments."""
        return self.capacity * self.segment_bytes

    @property
    def orphaned_bytes(self) -> int:
        """What was evicted and is still seen by somebody."""
        return len(self._orphans) * self.segment_bytes

    @property
    def locked(self) -> bool:
        """Whether every page that is there is locked in memory."""
        with self._lock:
            return bool(self._warm) and all(segment.locked for segment in self._warm)

    def available(self) -> int:
        """How many segments `obtain` would give now."""
        self.reap()
        return self.capacity - self._made + len(self._free)

    def obtain(self, count: int) -> list[Segment]:
        """Up to ``count`` segments that nobody sees; those with pages first."""
        self.reap()
        with self._lock:
            segments = [self._free.pop() for _ in range(min(count, len(self._free)))]
        while len(segments) < count and self._made < self.capacity:
            try:
                segments.append(self._make())
            except HostMemoryError:
                break
        return segments

    def release(self, segment: Segment) -> None:
        """Take a segment back; it is free once nobody sees it."""
        self._used.add(segment)
        if segment.held:
            self._orphans.append(segment)
        else:
            with self._lock:
                self._free.append(segment)

    def reap(self) -> None:
        """Free the orphans that nobody sees any more."""
        orphans, self._orphans = self._orphans, []
        for segment in orphans:
            self.release(segment)

    def wipe_after(self, segment: Segment, nbytes: int) -> None:
        """Leave nothing of an earlier model behind the bytes of a part that is shorter."""
        if segment in self._used and nbytes < self.segment_bytes:
            ctypes.memset(segment.address + nbytes, 0, self.segment_bytes - nbytes)

    def prefault(self, stop: threading.Event) -> None:
        """Supply the pages of every segment, in the background; ends early with ``stop``.

        Filling a segment supplies its pages too: this makes the first load as fast as the second.
        """
        while not stop.is_set():
            with self._lock:
                segment = next((one for one in self._free if one not in self._warm), None)
                if segment is not None:
                    self._free.remove(segment)
                elif self._made >= self.capacity:
                    return
            try:
                segment = segment or self._make()
                for at in range(0, self.segment_bytes, _PREFAULT_STEP_BYTES):
                    if stop.is_set():
                        return
                    size = min(_PREFAULT_STEP_BYTES, self.segment_bytes - at)
                    segment.prefault(at, size)
            except HostMemoryError:
                return
            with self._lock:
                self._warm.add(segment)
                self.prefaulted_bytes += self.segment_bytes
                self._free.append(segment)

    def _make(self) -> Segment:
        with self._lock:
            if self._made >= self.capacity:
                raise HostMemoryError("the pool is at its limit")
            self._made += 1
        try:
            return Segment(self.segment_bytes)
        except BaseException:
            with self._lock:
                self._made -= 1
            raise

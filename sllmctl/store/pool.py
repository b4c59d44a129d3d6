"""The pool: a budget of memory in equal segments, and who has which."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable

from sllmctl.core.units import format_size
from sllmctl.errors import ConfigError, HostMemoryError
from sllmctl.native import Segment
from sllmctl.store.backing import Backing, memory_files

MIB = 2**20
MIN_SEGMENT_BYTES = 2 * MIB
MAX_SEGMENT_BYTES = 256 * MIB
_SEGMENTS_WANTED = 16
_PREFAULT_STEP_BYTES = 32 * MIB
_PREFAULT_DEADLINE_S = 5.0
_PREFAULT_RETRY_S = 1.0
_CLOSED_POLL_S = 0.1


def choose_segment_bytes(pool_bytes: int) -> int:
    """The largest power of two, 2 MiB to 256 MiB, of which the pool has at least 16."""
    wanted = max(pool_bytes // _SEGMENTS_WANTED, MIN_SEGMENT_BYTES)
    return min(MAX_SEGMENT_BYTES, 1 << (wanted.bit_length() - 1))


class Pool:
    """Segments that are free, given out, or orphaned: evicted, but still seen by some process.

    Never more than the budget is filled at a time, orphans included. Calls are of one thread, but
    for `prefault`, `wait_until_closed` and `complete`.

    Args:
        pool_bytes: The budget.
        segment_bytes: Size of a segment, a multiple of 2 MiB.
        choose: Says what segments are made of, told the whole segments' bytes and one's.

    Raises:
        ConfigError: The sizes make no sense.
    """

    def __init__(
        self,
        pool_bytes: int,
        segment_bytes: int,
        choose: Callable[[int, int], Backing] = memory_files,
    ) -> None:
        if segment_bytes % MIN_SEGMENT_BYTES or segment_bytes <= 0:
            raise ConfigError(
                f"a segment of {format_size(segment_bytes)} is not a multiple of 2 MiB",
                hint="write it like 256MiB",
            )
        self.segment_bytes = segment_bytes
        self.capacity = pool_bytes // segment_bytes
        if self.capacity == 0:
            raise ConfigError(
                f"a pool of {format_size(pool_bytes)} has no room for a segment of "
                f"{format_size(segment_bytes)}",
                hint="use a larger --mem-pool-size or a smaller --segment-size",
            )
        self.backing = choose(self.bytes, segment_bytes)
        self._changed = threading.Condition()
        self._free: list[Segment] = []
        self._orphans: list[Segment] = []
        self._abandoned: list[tuple[Segment, Callable[[], bool]]] = []
        self._all: list[Segment] = []
        self._warm: set[Segment] = set()  # those whose pages were supplied beforehand
        self._used: set[Segment] = set()  # those that held a model before
        self._seen: set[Segment] = set()  # those that another user has had in his hands
        self._closing: list[Segment] = []  # by a thread, which is there while this holds any
        self._in_hand = False  # the prefaulter has one that is neither free nor given out
        self._wanted = False  # and is asked for it

    @property
    def bytes(self) -> int:
        """The whole budget, in whole segments."""
        return self.capacity * self.segment_bytes

    @property
    def orphaned_bytes(self) -> int:
        """What was evicted and is still seen by somebody."""
        return (len(self._orphans) + len(self._abandoned)) * self.segment_bytes

    @property
    def prefaulted_bytes(self) -> int:
        """Segments whose pages were supplied beforehand."""
        return len(self._warm) * self.segment_bytes

    @property
    def locked(self) -> bool:
        """Whether every segment there is is locked in memory."""
        return all(segment.locked for segment in list(self._all))

    def available(self) -> int:
        """How many segments `obtain` would give now."""
        self.reap()
        with self._changed:
            return self.capacity - len(self._all) + len(self._free) + self._in_hand

    def obtain(self, count: int) -> list[Segment]:
        """Up to ``count`` segments that nobody sees; those with pages first."""
        self.reap()
        segments: list[Segment] = []
        with self._changed:
            try:
                while len(segments) < count:
                    if self._free:
                        segments.append(self._free.pop())
                    elif len(self._all) < self.capacity:
                        segments.append(self._make())
                    elif self._in_hand:  # for as long as the kernel takes to supply 32 MiB
                        self._wanted = True
                        self._changed.wait_for(
                            lambda: self._free or not self._in_hand, _PREFAULT_DEADLINE_S
                        )
                        if not self._free:
                            break
                    else:
                        break
            except HostMemoryError:
                pass  # what there is
            except BaseException:
                self._free += segments
                raise
            finally:
                self._wanted = False
                self._changed.notify_all()
        return segments

    def release(self, segment: Segment) -> None:
        """Take a segment back; it is free once nobody sees it.

        Where the kernel does not tell, its memory ends with whoever sees it last, and another
        takes its place; so it does where another user may have pages of it in a pipe.
        """
        self._used.add(segment)
        if segment.recyclable and segment.held:
            self._orphans.append(segment)
        elif not segment.recyclable or segment in self._seen:
            with self._changed:
                self._all.remove(segment)
                for kind in (self._used, self._warm, self._seen):
                    kind.discard(segment)
            self._close(segment)
        else:
            with self._changed:
                self._free.append(segment)

    def _close(self, segment: Segment) -> None:
        """Give a segment's memory back to the system; elsewhere, for that takes 0.1 s a GB."""
        with self._changed:
            self._closing.append(segment)
            if len(self._closing) > 1:
                return

        def run() -> None:
            while True:
                self._closing[0].close()
                with self._changed:
                    self._closing.pop(0)
                    self._changed.notify_all()
                    if not self._closing:
                        return

        try:
            threading.Thread(target=run, name="sllm-close", daemon=True).start()
        except RuntimeError:  # no thread can be had
            run()

    def wait_until_closed(self, stopped: Callable[[], bool]) -> None:
        """Wait until the system has back what was given back: a full pool has no memory before."""
        with self._changed:
            while self._closing and not stopped():
                self._changed.wait(_CLOSED_POLL_S)

    def seen_by_others(self, segments: Iterable[Segment]) -> None:
        """These are handed to another user: they are never filled with another model.

        ``splice`` keeps pages of them in a pipe when nobody has the file open or mapped any more.
        """
        self._seen.update(segments)

    def abandon(self, segment: Segment, returned: Callable[[], bool]) -> None:
        """Take back a segment that a read may still write to, until that has returned."""
        self._abandoned.append((segment, returned))

    def reap(self) -> None:
        """Free the orphans that nobody sees or writes to any more."""
        orphans, self._orphans = self._orphans, []
        abandoned, self._abandoned = self._abandoned, []
        for segment, returned in abandoned:
            if returned():
                orphans.append(segment)
            else:
                self._abandoned.append((segment, returned))
        for segment in orphans:
            self.release(segment)

    def complete(self, segment: Segment, nbytes: int) -> None:
        """Make a filled segment ready to be given out; for any thread.

        Nothing of an earlier model is left behind the bytes of a part that is shorter.
        """
        if segment in self._used and nbytes < self.segment_bytes:
            ctypes.memset(segment.address + nbytes, 0, self.segment_bytes - nbytes)
        segment.complete()

    def prefault(self, stop: threading.Event) -> None:
        """Supply the pages of every segment, in the background; ends early with ``stop``.

        Filling a segment supplies its pages too: this makes the first load as fast as the second.
        """
        while not stop.is_set():
            with self._changed:
                while self._wanted:  # else what was just given back would be taken again
                    self._changed.wait(_PREFAULT_RETRY_S)
                segment = next((one for one in self._free if one not in self._warm), None)
                if segment is not None:
                    self._free.remove(segment)
                elif len(self._all) < self.capacity:
                    try:
                        segment = self._make()
                    except HostMemoryError:
                        return
                elif self._warm.issuperset(self._all):
                    return
                self._in_hand = segment is not None
            if segment is None:
                stop.wait(_PREFAULT_RETRY_S)  # those that are in use come back some day
            elif not self._supply(segment, stop):
                return

    def _supply(self, segment: Segment, stop: threading.Event) -> bool:
        """Supply a segment's pages, and give it back; False when there is no memory left."""
        whole = False
        self.wait_until_closed(lambda: stop.is_set() or self._wanted)
        try:
            for at in range(0, self.segment_bytes, _PREFAULT_STEP_BYTES):
                if stop.is_set() or self._wanted:
                    return True
                segment.prefault(at, min(_PREFAULT_STEP_BYTES, self.segment_bytes - at))
            whole = True
            return True
        except HostMemoryError:
            return False
        finally:
            with self._changed:
                if whole:
                    self._warm.add(segment)
                self._free.append(segment)
                self._in_hand = False
                self._changed.notify_all()

    def _make(self) -> Segment:
        segment = self.backing.make(self.segment_bytes)
        self._all.append(segment)
        return segment

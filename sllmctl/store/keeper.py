"""The store's state: models, their segments and leases. Knows no socket."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sllmctl.core.units import format_size
from sllmctl.errors import StoreError
from sllmctl.native import Progress, Segment
from sllmctl.store.files import ModelFiles
from sllmctl.store.filler import Filling, Outcome, fill
from sllmctl.store.pool import Pool
from sllmctl.store.protocol import FILES_CHANGED, MAX_PARTS, collect_fds
from sllmctl.store.residency import Identity, Lease, Piece, StoredModel, choose_victims

log = logging.getLogger(__name__)
_FILLERS = 16
_END_S = 5.0
_HUNG_S = 80.0
"""A filler that asks nothing for so long hangs, and not in a read, which has a deadline itself."""

LOAD_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)


@dataclass(slots=True)
class Histogram:
    """Durations: how many took no longer than each bound, their sum, and their number."""

    counts: list[int] = field(default_factory=lambda: [0] * len(LOAD_SECONDS))
    sum: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        """Count one."""
        for number, bound in enumerate(LOAD_SECONDS):
            self.counts[number] += seconds <= bound
        self.sum += seconds
        self.count += 1


@dataclass(slots=True)
class Counters:
    """What the store did since its start."""

    loads: int = 0
    bytes_disk: int = 0
    bytes_cache: int = 0
    bytes_warm: int = 0
    evictions: int = 0
    errors: int = 0
    load_seconds: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class Keeper:
    """Keeps models in the pool. All calls are of the daemon's own thread.

    Attributes:
        pool: Where segments come from.
        call_soon: Runs a function on the daemon's thread; called by fillers.
        threads: Reader threads of one fill; 0 for the library's choice.
    """

    pool: Pool
    call_soon: Callable[[Callable[[], None]], None]
    threads: int = 0
    models: dict[Identity, StoredModel] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    _turns: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_FILLERS))
    _stopping: threading.Event = field(default_factory=threading.Event)

    def attach(
        self,
        files: ModelFiles,
        *,
        pid: int,
        arrived: Callable[[list[Piece]], None],
        settled: Callable[[str | None], None],
    ) -> Lease:
        """Give a client a lease on a model, and start to fill what is missing and has room.

        Args:
            files: The model's; they stay the caller's.
            pid: Of the client.
            arrived: Called with parts as they become warm. Those that are already, are not
                announced: see ``lease.model.warm``.
            settled: Called when all have that will, unless the lease is not ``waiting``.

        Raises:
            StoreError: It has too many parts.
        """
        model = self.models.get(files.identity)
        if model is None:
            parts = sum(-(-size // self.pool.segment_bytes) for _, size in files.shards)
            if parts > MAX_PARTS:
                raise StoreError(
                    f"`{files.name}` has {parts} parts of {format_size(self.pool.segment_bytes)}, "
                    f"and a store takes {MAX_PARTS}",
                    hint="start it with a larger --segment-size",
                )
            model = StoredModel(files.identity, files.name, files.shards, self.pool.segment_bytes)
            self.models[files.identity] = model
        if files.named:
            for other in list(self.models.values()):
                if other is not model and other.named and other.name == files.name:
                    # The checkpoint was replaced: its pin goes with its name.
                    other.named = other.pinned = False
                    self._forget_if_empty(other)
            model.name, model.named = files.name, True
        lease = self.lease(model, pid=pid, arrived=arrived, settled=settled)
        try:
            if not model.filling:
                self._fill(model, files.fds)
        except BaseException:
            self.release(lease)
            raise
        if model.filling:
            model.waiting.add(lease)
        return lease

    def lease(
        self,
        model: StoredModel,
        *,
        pid: int,
        arrived: Callable[[list[Piece]], None],
        settled: Callable[[str | None], None],
    ) -> Lease:
        """Give a client a lease on what the store has of a model."""
        now = time.monotonic()
        model.last_used_s = now
        lease = Lease(model, pid, now, arrived, settled)
        model.leases.add(lease)
        if model.filling:
            model.waiting.add(lease)
        self.counters.loads += 1
        self.counters.bytes_warm += model.warm_bytes
        return lease

    def find(self, name: str) -> StoredModel | None:
        """The model that has this name below the storage path, if the store holds any of it."""
        return next((m for m in self.models.values() if m.named and m.name == name), None)

    def release(self, lease: Lease) -> None:
        """The client is gone, or done."""
        lease.model.last_used_s = time.monotonic()
        lease.model.leases.discard(lease)
        lease.model.waiting.discard(lease)
        self._forget_if_empty(lease.model)

    def reassure(self) -> None:
        """Let those who wait for a fill hear that it goes on, however slow the disk is.

        Of one that hangs they hear nothing: they give the store up, and try for themselves.
        """
        now = time.monotonic()
        begun = [m.heard_s for m in self.models.values() if m.filling and m.heard_s is not None]
        for model in list(self.models.values()):
            # Who waits for his turn waits for any of the others to move.
            last = max(begun, default=now) if model.heard_s is None else model.heard_s
            if now - last < _HUNG_S:
                for lease in list(model.waiting):
                    lease.arrived([])

    def evict(self, model: StoredModel) -> None:
        """Give a model's segments back.

        Raises:
            StoreError: It is in use, or still loading.
        """
        if model.leases or model.filling:
            pids = sorted({lease.pid for lease in model.leases})
            raise StoreError(
                f"`{model.name}` is in use"
                + (f" by pid {', '.join(map(str, pids))}" if pids else ""),
                hint="end these processes first, or wait until they are done",
            )
        model.pinned = False
        for segment in model.warm.values():
            self.pool.release(segment)
        self.counters.evictions += len(model.warm)
        model.warm.clear()
        self._forget_if_empty(model)

    def close(self) -> None:
        """Stop filling, and wait for those who fill, but not for a disk that does not answer."""
        self._stopping.set()
        deadline = time.monotonic() + _END_S
        for _ in range(_FILLERS):
            self._turns.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def _forget_if_empty(self, model: StoredModel) -> None:
        if model.mixed and not (model.leases or model.filling):
            for segment in model.warm.values():
                self.pool.release(segment)
            model.warm.clear()
        if not (model.leases or model.warm or model.filling or model.pinned):
            self.models.pop(model.identity, None)

    def _fill(self, model: StoredModel, fds: Sequence[int]) -> None:
        missing = [piece for piece in model.pieces() if piece not in model.warm]
        taken = dict(zip(missing, self._make_room(model, len(missing)), strict=False))
        if not taken:
            return
        # Shards by their number among those that are read.
        used = sorted({shard for shard, _ in taken})
        numbers = {shard: number for number, shard in enumerate(used)}
        parts = {
            (numbers[piece[0]], piece[1]): (segment, model.piece_bytes(piece))
            for piece, segment in taken.items()
        }
        own: list[int] = []
        try:
            own += collect_fds(os.dup, [fds[shard] for shard in used])
            work = Filling(
                files=[(fd, model.shards[shard][0]) for fd, shard in zip(own, used, strict=True)],
                identity=tuple(model.identity[shard] for shard in used),
                parts=[(piece, *part) for piece, part in parts.items()],
                segment_bytes=model.segment_bytes,
                threads=self.threads,
            )

            def full(pieces: list[Piece], progress: Progress) -> None:
                for piece in pieces:
                    self.pool.complete(*parts[piece])
                arrived = [(used[number], index) for number, index in pieces]
                self.call_soon(lambda: self._arrived(model, arrived, progress))

            model.heard_s = None

            def stopped() -> bool:
                model.heard_s = time.monotonic()
                return self._stopping.is_set()

            def run() -> None:
                try:
                    with self._turns:
                        stopped()  # it has its turn
                        self.pool.wait_until_closed(stopped)
                        outcome = fill(work, full, stopped)
                except Exception as exc:
                    log.exception("filling `%s` failed", model.name)
                    outcome = Outcome(f"{type(exc).__name__}: {exc}", stuck=lambda: False)
                self.call_soon(lambda: self._settled(model, outcome))

            try:
                # No executor's, which keeps work that it found no thread for, and does it later.
                threading.Thread(target=run, name="sllm-fill", daemon=True).start()
            except RuntimeError as exc:
                raise StoreError(
                    f"`{model.name}` cannot be read: {exc}",
                    hint="raise the limit of processes (`ulimit -u`, a container's pids limit)",
                ) from exc
        except BaseException:
            for fd in own:
                os.close(fd)
            for segment in taken.values():
                self.pool.release(segment)
            raise
        # Messages of the filler come to this thread, and so after this.
        model.coming, model.filling = taken, True
        model.disk_bytes = model.cache_bytes = 0

    def _make_room(self, model: StoredModel, count: int) -> list[Segment]:
        short = count - self.pool.available()
        for victim, piece in choose_victims(self.models.values(), model, short):
            self.pool.release(victim.warm.pop(piece))
            self.counters.evictions += 1
            self._forget_if_empty(victim)
        return self.pool.obtain(count)

    def _arrived(self, model: StoredModel, pieces: list[Piece], progress: Progress) -> None:
        for piece in pieces:
            model.warm[piece] = model.coming.pop(piece)
        self.counters.bytes_disk += progress.bytes_disk - model.disk_bytes
        self.counters.bytes_cache += progress.bytes_cache - model.cache_bytes
        model.disk_bytes, model.cache_bytes = progress.bytes_disk, progress.bytes_cache
        for lease in list(model.waiting):
            lease.arrived(pieces)

    def _settled(self, model: StoredModel, outcome: Outcome) -> None:
        reason = outcome.reason
        for segment in model.coming.values():
            if outcome.stuck is not None:
                self.pool.abandon(segment, outcome.stuck)
            else:
                self.pool.release(segment)
        model.coming, model.filling = {}, False
        if reason is not None:
            self.counters.errors += 1
            log.warning("`%s` could not be filled: %s", model.name, reason)
        if reason == FILES_CHANGED:
            model.mixed, model.named, model.pinned = True, False, False
        waiting, model.waiting = model.waiting, set()
        for lease in waiting:
            lease.settled(reason)
        self._forget_if_empty(model)

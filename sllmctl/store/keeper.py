"""The store's state: models, their segments and leases. Knows no socket."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from sllmctl.errors import StoreError
from sllmctl.native import Segment
from sllmctl.store.filler import Filling, Outcome, fill
from sllmctl.store.pool import Pool
from sllmctl.store.residency import Identity, Lease, Piece, StoredModel, choose_victims

log = logging.getLogger(__name__)
_FILLERS = 16


@dataclass(slots=True)
class Counters:
    """What the store did since its start."""

    loads: int = 0
    bytes_disk: int = 0
    bytes_warm: int = 0
    evictions: int = 0
    errors: int = 0


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
    _fillers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_FILLERS, "sllm-fill")
    )
    _stopping: threading.Event = field(default_factory=threading.Event)

    def attach(
        self,
        name: str,
        shards: Sequence[tuple[str, int]],
        fds: Sequence[int],
        identity: Identity,
        *,
        pid: int,
        arrived: Callable[[list[Piece]], None],
        settled: Callable[[str | None], None],
        trusted_name: bool = False,
    ) -> Lease:
        """Give a client a lease on a model, and start to fill what is missing and has room.

        The descriptors stay the caller's. Parts that are warm already are not announced: see
        ``lease.model.warm``.
        """
        model = self.models.get(identity)
        if model is None:
            model = StoredModel(identity, name, tuple(shards), self.pool.segment_bytes)
            self.models[identity] = model
        elif trusted_name:
            model.name = name
        if trusted_name:
            for other in self.models.values():
                if other is not model and other.name == name:
                    other.pinned = False  # the checkpoint was replaced: its pin goes with the name
        now = time.monotonic()
        model.last_used_s = now
        lease = Lease(model, pid, now, arrived, settled)
        model.leases.add(lease)
        self.counters.loads += 1
        self.counters.bytes_warm += model.warm_bytes
        try:
            if not model.filling:
                self._fill(model, fds)
        except BaseException:
            self.release(lease)
            raise
        if model.filling:
            model.waiting.add(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """The client is gone, or done."""
        lease.model.leases.discard(lease)
        lease.model.waiting.discard(lease)
        self._forget_if_empty(lease.model)

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
        """Stop filling, and wait for those who fill."""
        self._stopping.set()
        self._fillers.shutdown(wait=True)

    def _forget_if_empty(self, model: StoredModel) -> None:
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
            own += [os.dup(fds[shard]) for shard in used]
            work = Filling(
                files=[(fd, model.shards[shard][0]) for fd, shard in zip(own, used, strict=True)],
                identity=tuple(model.identity[shard] for shard in used),
                parts=[(piece, *part) for piece, part in parts.items()],
                segment_bytes=model.segment_bytes,
                threads=self.threads,
            )

            def full(pieces: list[Piece]) -> None:
                for piece in pieces:
                    self.pool.wipe_after(*parts[piece])
                arrived = [(used[number], index) for number, index in pieces]
                self.call_soon(lambda: self._arrived(model, arrived))

            def run() -> None:
                try:
                    outcome = fill(work, full, self._stopping.is_set)
                except Exception as exc:
                    log.exception("filling `%s` failed", model.name)
                    outcome = Outcome(f"{type(exc).__name__}: {exc}", stuck=True)
                self.call_soon(lambda: self._settled(model, outcome))

            self._fillers.submit(run)
        except BaseException:
            for fd in own:
                os.close(fd)
            for segment in taken.values():
                self.pool.release(segment)
            raise
        # Messages of the filler come to this thread, and so after this.
        model.coming, model.filling = taken, True

    def _make_room(self, model: StoredModel, count: int) -> list[Segment]:
        short = count - self.pool.available()
        for victim, piece in choose_victims(self.models.values(), model, short):
            self.pool.release(victim.warm.pop(piece))
            self.counters.evictions += 1
            self._forget_if_empty(victim)
        return self.pool.obtain(count)

    def _arrived(self, model: StoredModel, pieces: list[Piece]) -> None:
        for piece in pieces:
            model.warm[piece] = model.coming.pop(piece)
            self.counters.bytes_disk += model.piece_bytes(piece)
        for lease in list(model.waiting):
            lease.arrived(pieces)

    def _settled(self, model: StoredModel, outcome: Outcome) -> None:
        reason = outcome.reason
        for segment in model.coming.values():
            if outcome.stuck:
                self.pool.abandon(segment)
            else:
                self.pool.release(segment)
        model.coming, model.filling = {}, False
        if reason is not None:
            self.counters.errors += 1
            log.warning("`%s` could not be filled: %s", model.name, reason)
        waiting, model.waiting = model.waiting, set()
        for lease in waiting:
            lease.settled(reason)
        self._forget_if_empty(model)

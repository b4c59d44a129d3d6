"""What the store answers besides attaching: its status, and models by name. Knows no socket."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sllmctl.errors import StoreError
from sllmctl.store.keeper import LOAD_SECONDS, Keeper
from sllmctl.store.lookups import Lookups
from sllmctl.store.protocol import MAX_MESSAGE_BYTES, Message, encode


@dataclass(frozen=True, slots=True)
class Settings:
    """How to serve.

    Attributes:
        storage: Where names are looked up.
        socket_path: Where to listen.
        pool_bytes: Budget of memory.
        segment_bytes: Size of a segment.
        group: Members of this group may use the store, too.
        preload: Names of models to warm at the start.
        threads: Reader threads of one fill; 0 for the library's choice.
        metrics: Address to serve Prometheus metrics at; None for nowhere.
    """

    storage: Path
    socket_path: Path
    pool_bytes: int
    segment_bytes: int
    group: int | None = None
    preload: Sequence[str] = ()
    threads: int = 0
    metrics: str | None = None


class Service:
    """The keeper's state as clients see it, and the rules of who may ask for what."""

    def __init__(self, settings: Settings, keeper: Keeper, lookups: Lookups) -> None:
        self.settings = settings
        self.keeper = keeper
        self.lookups = lookups
        self._started_s = time.monotonic()

    def status(self) -> Message:
        """The document that `sllmctl status --json` prints."""
        keeper, pool = self.keeper, self.keeper.pool
        now = time.monotonic()
        models = list(keeper.models.values())
        held = [model.warm_bytes for model in models]
        in_use = sum(len(model.warm) + len(model.coming) for model in models)
        leases = sorted(
            (lease for model in models for lease in model.leases), key=lambda lease: lease.since_s
        )
        return {
            "event": "status",
            "schema": "sllmctl.status/1",
            "pid": os.getpid(),
            "uptime_s": now - self._started_s,
            "socket": str(self.settings.socket_path),
            "pool": {
                "bytes": pool.bytes,
                "used_bytes": in_use * pool.segment_bytes,
                "pinned_bytes": sum(len(m.warm) for m in models if m.pinned) * pool.segment_bytes,
                "leased_bytes": sum(len(m.warm) for m in models if m.leases) * pool.segment_bytes,
                "orphaned_bytes": pool.orphaned_bytes,
                "segment_bytes": pool.segment_bytes,
                "page_bytes": pool.backing.page_bytes,
                "backing": pool.backing.kind,
                "locked": pool.locked,
                "prefaulted_bytes": pool.prefaulted_bytes,
            },
            "models": _fitting(
                {
                    "name": model.name,
                    "bytes": model.nbytes,
                    "warm_bytes": warm_bytes,
                    "state": model.state,
                    "pinned": model.pinned,
                    "leases": len(model.leases),
                    "last_used_s": now - model.last_used_s,
                }
                for model, warm_bytes in zip(models, held, strict=True)
            ),
            "leases": _fitting(
                {"pid": lease.pid, "model": lease.model.name, "age_s": now - lease.since_s}
                for lease in leases
            ),
            "counters": {
                "loads": keeper.counters.loads,
                "bytes_disk": keeper.counters.bytes_disk,
                "bytes_cache": keeper.counters.bytes_cache,
                "bytes_warm": keeper.counters.bytes_warm,
                "evictions": keeper.counters.evictions,
                "errors": keeper.counters.errors,
                "load_seconds": {
                    "bounds": list(LOAD_SECONDS),
                    "counts": list(keeper.counters.load_seconds.counts),
                    "sum": keeper.counters.load_seconds.sum,
                    "count": keeper.counters.load_seconds.count,
                },
            },
        }

    def own(self, uid: int) -> bool:
        """Whether a user is the daemon's own, or root."""
        return uid in (os.geteuid(), 0)

    def require_trusted(self, uid: int) -> None:
        """Names, and what others have warm, are the daemon's own user's business, and root's.

        Raises:
            StoreError: The client is another user, and not let in by ``--group``.
        """
        if self.own(uid) or self.settings.group is not None:
            return
        raise StoreError(
            f"user {uid} may not ask for models by name",
            hint="run the command as the user who runs the store",
        )


def _fitting(entries: Iterable[Message]) -> list[Message]:
    """The first of a list, as many as leave room in a message for another list and the rest."""
    room, taken = MAX_MESSAGE_BYTES // 3, []
    for entry in entries:
        room -= len(encode(entry))
        if room < 0:
            break
        taken.append(entry)
    return taken

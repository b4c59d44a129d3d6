"""Looking into a store, and saying what it keeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllmctl.core.progress import ProgressFn
from sllmctl.errors import StoreError
from sllmctl.store.client import StoreClient
from sllmctl.store.protocol import close_fds


@dataclass(frozen=True, slots=True)
class Warmed:
    """What a warming came to; sizes in bytes, headers included.

    Attributes:
        bytes: Of the model.
        warm_bytes: What is in memory now.
        read_bytes: What was brought in for this,
        cache_bytes: and how much of that was in the page cache.
        elapsed_s: How long it took.
    """

    bytes: int
    warm_bytes: int
    read_bytes: int
    cache_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Evicted:
    """What an eviction gave back to the pool, and why some models stay."""

    bytes: int
    kept: list[str]


def status(*, socket: Path | None = None) -> dict[str, Any]:
    """What the store holds, and for whom: the document of ``sllmctl status --json``.

    Args:
        socket: The store's, instead of the usual ones.

    Raises:
        StoreUnreachable: None answers.
    """
    with StoreClient(socket) as client:
        answer = client.ask({"op": "status"})
    with _understood("status"):
        del answer["event"]
        _ = answer["pool"], answer["models"], answer["leases"]
    return answer


def warm(
    name: str,
    *,
    pin: bool = False,
    socket: Path | None = None,
    progress: ProgressFn | None = None,
) -> Warmed:
    """Bring a model into the store, so that its next load is warm.

    Args:
        name: Below the store's storage path.
        pin: Keep it until it is evicted.
        socket: The store's, instead of the usual ones.
        progress: Called with stage ``read``.

    Raises:
        StoreUnreachable: None answers.
        StoreError: There is no such model, or it cannot be read.
    """
    started = time.perf_counter()
    with StoreClient(socket) as client:
        attached = client.ask({"op": "warm", "name": name, "pin": pin})
        with _understood("answer"):
            nbytes, before = int(attached["bytes"]), int(attached["warm_bytes"])
        settled = False
        while not settled:
            message, fds = client.receive()
            close_fds(fds)
            with _understood("answer"):
                settled, warm_bytes = message["event"] == "settled", int(message["warm_bytes"])
            if progress is not None and not settled:
                progress("read", warm_bytes, nbytes)
    if message.get("reason"):
        raise StoreError(f"`{name}` could not be read: {message['reason']}")
    with _understood("answer"):
        cache_bytes = min(warm_bytes - before, int(message["cache_bytes"]))
    return Warmed(
        bytes=nbytes,
        warm_bytes=warm_bytes,
        read_bytes=warm_bytes - before,
        cache_bytes=cache_bytes,
        elapsed_s=time.perf_counter() - started,
    )


def evict(name: str | None = None, *, socket: Path | None = None) -> Evicted:
    """Give a model's memory back to the pool, or that of every model not in use and not pinned.

    Args:
        name: As `status` shows it.
        socket: The store's, instead of the usual ones.

    Raises:
        StoreUnreachable: None answers.
        StoreError: There is no such model, or it is in use.
    """
    with StoreClient(socket) as client:
        answer = client.ask({"op": "evict", "name": name})
    with _understood("answer"):
        return Evicted(int(answer["bytes"]), list(answer["kept"]))


@contextmanager
def _understood(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, ArithmeticError) as exc:
        raise StoreError(
            f"the store's {what} is invalid",
            hint="`sllmctl doctor` says whether it is of another release",
        ) from exc

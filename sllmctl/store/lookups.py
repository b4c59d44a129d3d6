"""Questions to a disk, asked on threads of their own: a disk that hangs holds up nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

from sllmctl.errors import StoreError

DEADLINE_S = 20.0
MAX_THREADS = 64

T = TypeVar("T")


class Lookups:
    """Runs what may wait for a disk, and brings the answer to the loop's thread by a deadline."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._threads = 0
        self._late = 0  # of those that wait, whom their disk has not answered by their deadline
        self.waiting = 0

    def start(
        self,
        work: Callable[[], T],
        done: Callable[[Future[T]], None],
        discard: Callable[[T], None],
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """Run ``work`` on a thread, then ``done`` with its outcome on the loop's.

        Args:
            work: May block for ever.
            done: Called once, with what ``work`` returned or raised, or the missed deadline.
            discard: Called with what ``work`` returned after the deadline.
            deadline_s: How long to wait.

        Raises:
            StoreError: Every thread hangs already.
        """
        if self._late >= MAX_THREADS:
            raise StoreError(
                f"{self._late} requests wait for a disk that does not answer",
                hint="look at `dmesg` and the mounts of the machine that runs the store",
            )
        self.waiting += 1
        outcome: Future[T] = Future()
        missed = False

        def run() -> None:
            try:
                outcome.set_result(work())
            except Exception as exc:
                outcome.set_exception(exc)
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(ended)

        def ended() -> None:
            self.waiting -= 1
            if not missed:
                timer.cancel()
                done(outcome)
                return
            self._late -= 1
            if outcome.exception() is None:
                discard(outcome.result())

        def miss() -> None:
            nonlocal missed
            missed = True
            self._late += 1
            late: Future[T] = Future()
            late.set_exception(StoreError(f"the disk has not answered for {deadline_s:.0f} s"))
            done(late)

        timer = self._loop.call_later(deadline_s, miss)
        self._work.put(run)
        if self._threads < min(self.waiting, MAX_THREADS):
            # No executor's: the interpreter would wait for those that hang at its end.
            self._threads += 1
            threading.Thread(target=self._run, name="sllm-lookup", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work.get()()

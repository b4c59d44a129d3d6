"""A few threads that work through a sequence of chunk tasks, with progress and Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from sllmctl.core.fileio import Buffer
from sllmctl.core.manifest import CHUNK_BYTES
from sllmctl.core.progress import ProgressFn

Task = Callable[[Buffer], int]
"""Handles one chunk in the given buffer of ``CHUNK_BYTES``; returns the bytes it is done with."""

_TICK_S = 0.1
_STOP_S = 0.3


def run_tasks(
    tasks: Iterable[Task],
    *,
    threads: int,
    stage: str,
    total_bytes: int,
    done_bytes: int = 0,
    buffer_bytes: int = CHUNK_BYTES,
    progress: ProgressFn | None = None,
    at_end: Callable[[], None] | None = None,
) -> None:
    """Run tasks in order of their start, several at a time, until all are done.

    ``tasks`` is advanced by one thread at a time, and never again after a failure or Ctrl-C.

    Args:
        tasks: May be a generator that does work of its own, such as opening files.
        threads: How many run at a time, each with a buffer of its own.
        stage: What ``progress`` is told.
        total_bytes: What ``progress`` is told.
        done_bytes: Where progress starts.
        buffer_bytes: Size of a buffer.
        progress: Called by the calling thread, a last time when all is done.
        at_end: Called once when no task runs any more, by the thread that ran the last: the place
            to close files. After Ctrl-C that can be later than the return of this call, if the
            system holds a thread up.

    Raises:
        Exception: The first that a task raised.
    """
    lock = threading.Lock()
    stop = False
    running = threads
    done = done_bytes
    failures: list[BaseException] = []
    iterator = iter(tasks)

    def work() -> None:
        nonlocal done, stop, running
        try:
            buffer = Buffer(buffer_bytes)
            while True:
                with lock:
                    task = None if stop else next(iterator, None)
                if task is None:
                    return
                nbytes = task(buffer)
                with lock:
                    done += nbytes
        except BaseException as exc:
            with lock:
                failures.append(exc)
                stop = True
        finally:
            with lock:
                running -= 1
                last = running == 0
            if last and at_end is not None:
                at_end()

    crew = [threading.Thread(target=work, name=f"sllm-io-{i}", daemon=True) for i in range(threads)]
    try:
        for worker in crew:
            worker.start()
        for worker in crew:
            while worker.is_alive():
                worker.join(_TICK_S)
                if progress is not None:
                    progress(stage, done, total_bytes)
    finally:
        with lock:
            stop = True
        deadline = time.monotonic() + _STOP_S
        for worker in crew:
            if worker.ident is not None:
                worker.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise failures[0]
    if progress is not None:
        progress(stage, done, total_bytes)

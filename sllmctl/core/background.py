"""A load that goes on while its caller does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from sllmctl.core.load import Loaded
from sllmctl.core.progress import ProgressFn
from sllmctl.errors import NativeError


class Loading:
    """A load under way, in a thread of its own.

    As a context manager it ends the load when the block is left early.

    Args:
        work: What loads, given a function to call with its progress, at least every 0.2 s.
        progress: The caller's.
    """

    def __init__(self, work: Callable[[ProgressFn], Loaded], progress: ProgressFn | None) -> None:
        self._progress = progress
        self._stop = threading.Event()
        self._future: Future[Loaded] = Future()
        # No daemon: one that is in torch while the interpreter ends aborts the process.
        run = (work, self._watch, self._future)
        threading.Thread(target=_run, args=run, name="sllm-load").start()

    def _watch(self, stage: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise NativeError("the load was cancelled")
        if self._progress is not None:
            self._progress(stage, done, total)

    @property
    def ended(self) -> bool:
        """Whether `wait` would return at once."""
        return self._future.done()

    def wait(self) -> Loaded:
        """Wait for the end of the load; an interrupted wait ends the load, too.

        Raises:
            SllmError: Whatever ended the load; the same at each call.
        """
        try:
            return self._future.result()
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ask the load to end, which it does within 0.2 s; one that has ended stays as it is."""
        self._stop.set()

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


def _run(work: Callable[[ProgressFn], Loaded], watch: ProgressFn, future: Future[Loaded]) -> None:
    try:
        loaded = work(watch)
    except BaseException as exc:
        future.set_exception(exc)
    else:
        future.set_result(loaded)
    finally:
        # A failure's traceback holds this frame: memory must not wait for the collector.
        del work, watch, future

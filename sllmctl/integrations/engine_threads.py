"""Engines fill large models from thread pools; what watches their writes is of one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def tasks_run_here() -> Iterator[None]:
    """Run at once, in this thread, what this thread submits to any thread pool meanwhile.

    A torch function mode is active in the thread that entered it alone. Other threads' tasks are
    left as they are.
    """
    here = threading.get_ident()
    submit = ThreadPoolExecutor.submit

    def submit_here(
        self: ThreadPoolExecutor, task: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        if threading.get_ident() != here:
            return submit(self, task, *args, **kwargs)
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as exc:
            future.set_exception(exc)
        return future

    ThreadPoolExecutor.submit = submit_here  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]

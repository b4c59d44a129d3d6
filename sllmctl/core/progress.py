"""How long work reports its progress to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

ProgressFn = Callable[[str, int, int], None]
"""Called as ``(stage, done_bytes, total_bytes)`` by the calling thread, a few times a second."""

BytesFn = Callable[[int], None]
"""Called now and then with the bytes that are in their place; what it raises ends the load."""


def report(progress: ProgressFn | None, total: int, before: int = 0) -> BytesFn | None:
    """Tell a load's progress from that of one of its reads."""
    if progress is None:
        return None
    return lambda done: progress("read", before + done, total)

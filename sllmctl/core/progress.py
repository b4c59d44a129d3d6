"""How long work reports its progress to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

ProgressFn = Callable[[str, int, int], None]
"""Called as ``(stage, done_bytes, total_bytes)`` by the calling thread, a few times a second."""

"""The table at the end of `make demo`, which takes too long to run as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import demo
from tests.store.conftest import RunningStore
from tests.store.test_named import warm


def test_the_demo_compares_loads(
    store: RunningStore,
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_model("m")
    warm(store, "m")
    monkeypatch.setattr(demo, "SOCKET", store.socket)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    demo.compare(path)
    shown = capsys.readouterr().out
    assert [state in shown for state in ("from disk", "page cache", "warm in store")] == [True] * 3

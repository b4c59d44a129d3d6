"""The torture runs in their short form; `make torture` has the long one."""

from __future__ import annotations

from pathlib import Path

from tests.torture.kill_convert import Torture


def test_kills_at_random_instants_leave_nothing_half(tmp_path: Path) -> None:
    torture = Torture(tmp_path, megabytes=24, seed=7)
    torture.run(8)
    assert torture.failures == []
    assert torture.outcomes.total() == 8

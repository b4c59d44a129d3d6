"""The short form of fuzzing; `make fuzz` has the long one."""

from __future__ import annotations

import pytest

from tests.fuzz.plain import fuzz
from tests.fuzz.targets import TARGETS, regressions, seeds


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_mutated_inputs_are_right_or_refused(target: str) -> None:
    fuzz(target, inputs=5000, seed=20)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_failed_once_is_right_or_refused(target: str) -> None:
    for path in regressions(target):
        TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_seeds_are_accepted(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[object] = []
    monkeypatch.setattr("tests.fuzz.targets._check_message", refused.append)
    for seed in seeds(target):
        TARGETS[target](seed)
    assert refused == []

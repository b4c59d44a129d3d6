"""Each scenario gives its findings and no others; each check is needed by one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllmctl.doctor.check import CHECKS, Status
from sllmctl.doctor.examine import examine
from tests.doctor.scenario import SCENARIOS, build, examined, findings


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_machine_gives_its_findings_and_no_others(name: str) -> None:
    done = examined(name)
    said = [f"{o.check.id} {o.finding.summary}" for o in done.outcomes if o.selected]
    assert findings(done) == SCENARIOS[name].expect, "\n".join(said)
    summaries = [str(o.finding.summary) for o in done.outcomes if o.check.id in findings(done)]
    assert SCENARIOS[name].says in " ".join(summaries)


@pytest.mark.parametrize("check_id", CHECKS)
def test_each_check_has_a_scenario_that_needs_it(check_id: str, place: Path) -> None:
    """Switch the check off: a scenario that expects its finding no longer gets it."""
    worst = CHECKS[check_id].severity.value
    needing = [s for s in SCENARIOS.values() if s.expect.get(check_id) == worst]
    assert needing, f"no scenario ends with {check_id} {worst}"
    done = examine(build(needing[0], place), without=[check_id])
    assert findings(done) != needing[0].expect


def test_each_check_passes_somewhere() -> None:
    passed = {o.check.id for name in SCENARIOS for o in examined(name).of(Status.PASS)}
    assert passed == set(CHECKS)


def test_rows_are_offered_where_parts_disagree_and_only_there() -> None:
    offered = {name: [row.name for row in examined(name).rows] for name in SCENARIOS}
    for name in (
        "guide 1: CANN 8.0.0 with torch 2.5.1 and NNAL 8.1.RC1",
        "guide 1, with vLLM installed",
    ):
        assert offered[name] == ["vllm-ascend 0.7.3.post1", "vllm-ascend 0.8.4rc2"]
    for name in ("healthy 8.1.RC1", "sllm-store on an untested CANN", "numpy 2 on CANN 8.1"):
        assert offered[name] == []

"""Each scenario gives its findings and no others; each check is needed by one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllmctl.doctor.check import CHECKS, Status
from sllmctl.doctor.examine import examine
from sllmctl.doctor.machine import Machine, Options
from sllmctl.doctor.tree_probe import TreeProbe
from tests.doctor.scenario import SCENARIOS, build, examined, findings
from tests.doctor.tree import Tree, good


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


def test_commands_to_copy_are_right_where_the_machine_is_odd(place: Path) -> None:
    tree = good(Tree(place))
    tree.env |= {
        "ASCEND_VISIBLE_DEVICES": "0-2,4",
        "http_proxy": "http://p:3128",
        "no_proxy": "a;b,$(c)",
    }
    tree.more["ports"] = [8000]
    probe = TreeProbe(tree.write())

    def fix(name: str, **options: str) -> str:
        done = examine(Machine(probe, Options(**options)), only=[name])  # type: ignore[arg-type]
        return next(o.finding.fix for o in done.outcomes if o.check.id == name)

    assert fix("CTR002") == "export ASCEND_RT_VISIBLE_DEVICES=0,1,2,4"
    value = "'a;b,$(c),localhost,127.0.0.1,::1'"
    assert fix("NET001") == f"export no_proxy={value} NO_PROXY={value}"
    for url, right in (
        ("localhost/v1", "http://localhost:8000/v1"),
        ("http://localhost:80/v1", "http://localhost:8000/v1"),
        ("http://u:p@[::1]:3000/v1", "http://u:p@[::1]:8000/v1"),
    ):
        assert fix("SRV001", base_url=url) == f"export OPENAI_BASE_URL={right}"
    tree.env["ASCEND_RT_VISIBLE_DEVICES"] = "none"
    probe = TreeProbe(tree.write())
    assert fix("ENV006") == "export ASCEND_RT_VISIBLE_DEVICES=0"
    for number in range(8):
        del tree.nodes[f"/dev/davinci{number}"]
    tree.command("npu-smi info", code=127)
    probe = TreeProbe(tree.write())
    assert fix("ENV006") == "unset ASCEND_RT_VISIBLE_DEVICES"


def test_the_commands_of_a_row_bring_no_torch_for_cuda(place: Path) -> None:
    tree = Tree(place)
    tree.arch = "x86_64"
    good(tree, "8.0.0")
    tree.dist("torch", "2.6.0+cpu")
    machine = Machine(TreeProbe(tree.write()))
    done = examine(machine)
    commands = [row.commands for row in done.rows]
    torch = (
        "pip install torch==2.5.1 --index-url https://download.pytorch.org/whl/cpu && "
        "pip install torch_npu==2.5.1"
    )
    assert all(torch in row for row in commands), commands
    assert torch in {o.finding.fix for o in done.outcomes if o.check.id in ("PY005", "VLLM002")}
    vllm = "VLLM_TARGET_DEVICE=empty pip install --no-deps vllm==0.8.4"
    assert any(vllm in row for row in commands), commands

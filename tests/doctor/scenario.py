"""What a scenario is: a machine, what is said about it, and the findings that must come out."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sllmctl.doctor.check import Status
from sllmctl.doctor.examine import Examination, examine
from sllmctl.doctor.machine import Machine, Options
from sllmctl.doctor.tree_probe import TreeProbe
from tests.doctor.tree import Tree, good

Delta = Callable[[Tree], object]
# Trees are hundreds of small files, thousands in all: a disk makes that slow.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
FINDINGS = (Status.INFO, Status.WARN, Status.FAIL, Status.ERROR)


@dataclass(frozen=True)
class Scenario:
    """A machine, and every finding that it must give: ID to (status, words in the sentence)."""

    name: str
    expect: dict[str, str]
    delta: Delta = lambda t: None
    base: Delta = good
    options: Options = field(default_factory=Options)
    says: str = ""

    def __str__(self) -> str:
        return self.name


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    name: str,
    expect: dict[str, str] | None = None,
    *,
    base: Delta = good,
    options: Options | None = None,
    says: str = "",
) -> Callable[[Delta], Delta]:
    """Register a function that changes a healthy machine into a scenario."""

    def register(delta: Delta) -> Delta:
        assert name not in SCENARIOS, name
        SCENARIOS[name] = Scenario(name, expect or {}, delta, base, options or Options(), says)
        return delta

    return register


def build(scenario: Scenario, root: Path) -> Machine:
    tree = Tree(root)
    scenario.base(tree)
    scenario.delta(tree)
    return Machine(TreeProbe(tree.write()), scenario.options)


@functools.cache
def examined(name: str) -> Examination:
    """The examination of a scenario; nothing of it reads the tree afterwards."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        return examine(build(SCENARIOS[name], Path(directory)))


def findings(done: Examination) -> dict[str, str]:
    return {
        o.check.id: o.finding.status.value for o in done.outcomes if o.finding.status in FINDINGS
    }

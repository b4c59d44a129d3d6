"""Machines in directories, and the command line on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tests.doctor.all_scenarios  # noqa: F401  (registers them)
from sllmctl.cli import app
from tests.doctor.scenario import MEMORY, SCENARIOS
from tests.doctor.tree import Tree

Doctor = Callable[..., Result]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Run `sllmctl doctor ARGUMENTS` in this process."""
    monkeypatch.setenv("LANG", "C.UTF-8")
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, text: str | None = None) -> Result:
        return CliRunner().invoke(app, ["doctor", *map(str, arguments)], input=text)

    return run


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory in memory."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        yield Path(directory)


@pytest.fixture
def machine(place: Path) -> Callable[[str], Path]:
    """Build a scenario's machine; back comes its root."""

    def make(name: str) -> Path:
        tree = Tree(place)
        SCENARIOS[name].base(tree)
        SCENARIOS[name].delta(tree)
        return tree.write()

    return make


def update_golden() -> bool:
    return bool(os.environ.get("UPDATE_GOLDEN"))

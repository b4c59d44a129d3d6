"""The C programs, plain and under the sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.build import MODES, run_program

PROGRAMS = sorted(Path(__file__).parent.glob("test_*.c"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem.removeprefix("test_"))
@pytest.mark.parametrize("mode", MODES)
def test_every_check_of_a_program_holds(program: Path, mode: str, tmp_path: Path) -> None:
    run_program(program, mode, tmp_path)

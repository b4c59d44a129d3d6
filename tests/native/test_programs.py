"""The C programs, plain and under the sanitizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.native.build import MODES

PROGRAMS = sorted(Path(__file__).parent.glob("test_*.c"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem.removeprefix("test_"))
@pytest.mark.parametrize("mode", MODES)
def test_every_check_of_a_program_holds(
    program: Path, mode: str, run: Callable[[Path, str], None]
) -> None:
    run(program, mode)

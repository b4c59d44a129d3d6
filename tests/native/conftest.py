"""Running the C test programs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.native.build import SANITIZER_OPTIONS, build_programs, launcher

TIMEOUT_S = 600


def run_program(source: Path, mode: str, directory: Path) -> None:
    """Build and run a program with its files below a directory.

    Raises:
        AssertionError: A test in it failed, or a sanitizer had something to say.
    """
    front = launcher(mode)
    if isinstance(front, str):
        pytest.skip(front)
    program = build_programs(mode, sorted(source.parent.glob("test_*.c")))[source.stem]
    done = subprocess.run(
        [*front, str(program), str(directory)],
        env={**os.environ, **SANITIZER_OPTIONS},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "ok " in done.stdout
    # A test that cannot tell anything here says so, and the run shows it.
    for line in done.stdout.splitlines():
        if line.startswith("skipped "):
            print(line)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Path, str], None]:
    """`run_program` in a directory of its own."""
    return lambda source, mode: run_program(source, mode, tmp_path)

"""Running the command line as a shell does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def sllmctl(tmp_path: Path) -> Run:
    """Run `sllmctl ARGUMENTS` in an empty directory, with no terminal."""
    directory = tmp_path / "cwd"
    directory.mkdir()

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sllmctl", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=directory,
            env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", **environment},
            timeout=120,
            check=False,
        )

    return run

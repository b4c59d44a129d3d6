"""The script that takes a machine's figures runs, and says when no hardware is behind them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.emulators import ascend, cuda
from tests.native.build import ROOT


@pytest.mark.parametrize(
    "device",
    ["npu:1", pytest.param("cuda:0", marks=pytest.mark.slow)],
)
def test_the_figures_are_taken_and_labelled(device: str, tmp_path: Path) -> None:
    folder = ascend("plain", "9.0") if device.startswith("npu") else cuda("plain")
    script = [sys.executable, "-m", "tests.device.hardware", "--device", device]
    done = subprocess.run(
        [*script, "--size", "32MiB", "--directory", str(tmp_path)],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("**EMULATED")
    assert f"\n{device}, " in done.stdout
    assert "Every byte of the last load was read back and is right." in done.stdout
    tables = len([line for line in done.stdout.splitlines() if line.startswith("|---")])
    if device.startswith("npu"):
        assert "Not registered: npu registers no memory." in done.stdout
        assert tables == 4
    else:
        assert tables == 5

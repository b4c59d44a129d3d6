"""The tests in `torch_npu/`, which need an environment of their own."""

from __future__ import annotations

import subprocess

import pytest

from tests.device.torch_npu.environment import HERE, PYTHON, environment


def test_torch_npu_on_the_emulated_runtime_passes_its_tests() -> None:
    if not PYTHON.exists():
        pytest.skip(f"no environment with torch_npu at `{PYTHON}`: `make test-npu` makes it")
    done = subprocess.run(
        [str(PYTHON), "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider"],
        env=environment(),
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

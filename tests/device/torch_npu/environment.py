"""An environment of its own for torch_npu, beside the one that all other tests run in.

python -m tests.device.torch_npu.environment make [torch_npu==VERSION]
python -m tests.device.torch_npu.environment run [ARGUMENTS OF PYTEST]

Where torch_npu is installed, `import torch` needs CANN. So it goes to `.venv-npu`, which takes
everything else from the main environment, and has the emulated runtime in place of CANN's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from tests.npu_emulator.build import build_for_torch_npu

HERE = Path(__file__).resolve().parent
HOME = Path(sys.prefix + "-npu")
PYTHON = HOME / "bin" / "python"
EMULATOR = HOME / "emulator"
SETTINGS = {
    "ACLEMU_HBM_MB": "512",
    "ACLEMU_CHECK_SRC": "1",
    "ACLEMU_POISON": "1",
    "ACLEMU_DELAY_US": "20",
}
"""Little memory, filled with rubbish, and copies that come late and look at their source twice."""


def make(torch_npu: str = "torch_npu==2.13.0") -> None:
    """Make the environment, or bring it up to date."""
    if not PYTHON.exists():
        venv.create(HOME, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(PYTHON)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", torch_npu], check=True)
    code = "import sysconfig; print(sysconfig.get_paths()['platlib'])"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    packages = Path(done.stdout.strip())
    # As site directories, so that what is installed there in editable form is found as well.
    main = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in main]
    (packages / "main_environment.pth").write_text("".join(lines))
    beside = packages / "torch"
    if not beside.exists():
        beside.symlink_to(_torch_folder())
    build_for_torch_npu(EMULATOR, packages)


def environment(**settings: str) -> dict[str, str]:
    """The variables for a process in it."""
    return {**os.environ, "LD_LIBRARY_PATH": str(EMULATOR), **SETTINGS, **settings}


def run(*arguments: str) -> int:
    """Run tests in it, those of this folder unless others are named; returns pytest's exit code."""
    command = [str(PYTHON), "-m", "pytest", *(arguments or [str(HERE)])]
    return subprocess.run(command, env=environment(), cwd=HERE.parents[2], check=False).returncode


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


if __name__ == "__main__":
    action, *rest = sys.argv[1:]
    sys.exit(make(*rest) if action == "make" else run(*rest))

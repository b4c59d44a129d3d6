"""Install this tree into an engine's environment as its users have it: as a wheel.

``python -m tests.engines.install PYTHON``; PYTHON is that environment's. The engine finds the entry
point in the wheel's metadata; nothing else of it is touched.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "build_native.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")


def install(python: str) -> None:
    """Build a wheel of a clean copy, and put it in the place of the one that is there."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        for file in FILES:
            shutil.copy(ROOT / file, source)
        for folder in ("sllmctl", "native"):
            ignore = shutil.ignore_patterns("*.so", "*.o", "__pycache__", ".*")
            shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", name, str(source)]
        subprocess.run([*pip, *build], check=True)
        (wheel,) = Path(name).glob("*.whl")
        put = ["install", "--no-deps", "--force-reinstall", str(wheel)]
        subprocess.run([*pip, "--python", python, *put], check=True)


if __name__ == "__main__":
    install(sys.argv[1])

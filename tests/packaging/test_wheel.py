"""What is in the sdist and in the wheel that is built from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "build_native.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
FOLDERS = ("sllmctl", "native", "tests")


class Built(NamedTuple):
    """One build: the tree it was made of, and the two archives."""

    source: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of a clean copy of the tree, and the wheel of that sdist. Nothing is downloaded."""
    source = tmp_path_factory.mktemp("packaging") / "machine-path"
    source.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("*.so", "*.o", "__pycache__", ".*")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."],
        cwd=source,
        env={**os.environ, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    (sdist,) = (source / "dist").glob("*.tar.gz")
    (wheel,) = (source / "dist").glob("*.whl")
    return Built(source, sdist, wheel)


def names_in_wheel(built: Built) -> list[str]:
    with zipfile.ZipFile(built.wheel) as archive:
        return archive.namelist()


def read_from_wheel(built: Built, ending: str) -> bytes:
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name)


def test_the_wheel_serves_every_cpython_from_3_10_on_this_machine(built: Built) -> None:
    assert re.fullmatch(r"sllmctl-[\d.]+-cp310-abi3-linux_\w+\.whl", built.wheel.name)
    tags = read_from_wheel(built, ".dist-info/WHEEL").decode()
    assert re.search(r"^Tag: cp310-abi3-linux_\w+$", tags, flags=re.MULTILINE)
    assert "Root-Is-Purelib: false" in tags


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    names = names_in_wheel(built)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sllmctl"}
    assert "sllmctl/_native.abi3.so" in names
    assert "sllmctl/_native.pyi" in names
    assert "sllmctl/py.typed" in names
    assert [name for name in names if name.endswith((".so", ".c", ".h", ".o"))] == [
        "sllmctl/_native.abi3.so"
    ]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sllmctl").rglob("*.py")}
    assert modules <= set(names)
    data = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sllmctl").rglob("*")
        if path.is_file() and path.suffix not in {".py", ".so", ".pyc"}
    }
    assert data <= set(names)


def test_the_wheel_says_what_it_needs_and_how_it_is_started(built: Built) -> None:
    metadata = Parser().parsestr(read_from_wheel(built, ".dist-info/METADATA").decode())
    assert metadata["Name"] == "sllmctl"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = metadata.get_all("Requires-Dist") or []
    assert not any("==" in requirement.partition(";")[0] for requirement in needed)
    entry_points = read_from_wheel(built, ".dist-info/entry_points.txt").decode()
    assert "sllmctl = sllmctl.__main__:main" in entry_points
    assert b"Apache License" in read_from_wheel(built, "/LICENSE")


def test_the_sdist_holds_all_that_a_build_needs_and_no_build(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "native").rglob("*.[ch]")}
    assert native <= names
    assert {"build_native.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_no_path_of_the_machine_that_built_it_is_left_in_the_module(built: Built) -> None:
    module = read_from_wheel(built, "_native.abi3.so")
    places = {
        str(built.source),
        str(ROOT),
        str(Path.home()),
        sysconfig.get_path("include"),
        sysconfig.get_config_var("LIBDIR"),
        "build-temp",
        "/tmp/",
    }
    # A home or prefix that every machine has tells nothing.
    telling = {place for place in places if place not in {"/", "/usr", "/usr/lib"}}
    assert [place for place in telling if place.encode() in module] == []


def test_the_installed_wheel_works_without_its_source(built: Built, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*install, "--target", str(tmp_path / "site"), str(built.wheel)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    script = (
        "import sllmctl.native as n, sllmctl.cli; "
        "m = n.Memory.create(5); print(n.__file__, n.abi_version(), m.nbytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.split() == [
        str(tmp_path / "site" / "sllmctl" / "native" / "__init__.py"),
        "1",
        "5",
    ]

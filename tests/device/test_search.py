"""Where a runtime library is looked for, and what is said when it is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.device.emulators import ascend
from tests.native.build import ROOT, compiler

LIBRARY = "libascendcl.so"
OPEN_DEVICE = """
    import sys
    from sllmctl import errors, native
    try:
        native.Device("npu").close()
    except errors.NativeError as exc:
        print(type(exc).__name__, exc)
    else:
        print("found")
"""


def run(script: str, **environment: str) -> str:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LD_LIBRARY_PATH", "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="CANN is installed here")
def test_without_the_library_the_device_is_unavailable_and_the_loader_says_why() -> None:
    said = run(OPEN_DEVICE)
    assert said.startswith("DeviceUnavailable cannot load the Ascend runtime (AscendCL): libascend")
    assert "No such file" in said


@pytest.mark.parametrize("variable", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
@pytest.mark.parametrize("name", [LIBRARY, "libacl_rt.so"])
def test_the_toolkit_s_folder_is_searched_for_both_names(
    variable: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "lib64").mkdir()
    shutil.copy(ascend("plain", "9.0") / LIBRARY, tmp_path / "lib64" / name)
    assert run(OPEN_DEVICE, **{variable: str(tmp_path)}) == "found"


def test_the_copy_that_the_process_has_loaded_is_taken(tmp_path: Path) -> None:
    shutil.copy(ascend("plain", "9.0") / LIBRARY, tmp_path / LIBRARY)
    script = f"""
        import ctypes
        from sllmctl import native
        loaded = ctypes.CDLL({str(tmp_path / LIBRARY)!r})
        loaded.aclemuStat.restype = ctypes.c_uint64
        native.Device("npu").close()
        print(loaded.aclemuStat(b"set_devices"))
    """
    there = str(ascend("plain", "9.0"))
    assert run(script, LD_LIBRARY_PATH=there) == "1"
    assert run(script) == "1"


def test_a_library_that_lacks_another_one_is_told_of_by_that_one_s_name(tmp_path: Path) -> None:
    folder = tmp_path / "lib64"
    folder.mkdir()
    hal = folder / "libascend_hal.so"
    build = [compiler(), "-shared", "-fPIC", "-x", "c", "/dev/null", "-Wl,--no-as-needed"]
    subprocess.run([*build, "-o", str(hal)], check=True)
    subprocess.run([*build, "-o", str(folder / LIBRARY), "-x", "none", str(hal)], check=True)
    hal.unlink()
    said = run(OPEN_DEVICE, ASCEND_HOME_PATH=str(tmp_path))
    assert said.startswith("DeviceUnavailable cannot load the Ascend runtime")
    assert "libascend_hal.so" in said


def test_what_has_the_name_and_not_the_functions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lib64").mkdir()
    build = [compiler(), "-shared", "-fPIC", "-x", "c", "/dev/null"]
    subprocess.run([*build, "-o", str(tmp_path / "lib64" / LIBRARY)], check=True)
    said = run(OPEN_DEVICE, ASCEND_HOME_PATH=str(tmp_path))
    assert said == "DeviceUnavailable the Ascend runtime (AscendCL) has no `aclInit`: it is too old"


def test_no_device_and_hidden_devices_are_said() -> None:
    there = str(ascend("plain", "9.0"))
    said = run(OPEN_DEVICE, LD_LIBRARY_PATH=there, ACLEMU_DEVICES="0")
    assert said == "DeviceUnavailable there is no device npu:0: 0 found"
    said = run(OPEN_DEVICE, LD_LIBRARY_PATH=there, ACLEMU_DEVICES="0", ASCEND_RT_VISIBLE_DEVICES="")
    assert said.endswith("0 found, and ASCEND_RT_VISIBLE_DEVICES is empty: it hides them all")

"""The C library on emulated runtimes: CANN under the rules of several releases, and CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.device.emulators import SANITIZED, ascend, cuda
from tests.native.build import run_program

PROGRAMS = Path(__file__).parent / "native"

PROFILES = {
    "newest": ("9.0", {}),
    "delayed": (
        "9.0",
        {"ACLEMU_DELAY_US": "100", "ACLEMU_CHECK_SRC": "1", "ACLEMU_POISON": "1"},
    ),
    "cann_8.1": ("8.1", {"ACLEMU_CANN_VERSION": "8.1.RC1"}),
    "cann_8.0": (
        "8.0",
        {
            "ACLEMU_CANN_VERSION": "8.0.0",
            "ACLEMU_PAGEABLE": "undefined",
            "ACLEMU_ALIGN": "64",
            "ACLEMU_CHECK_SRC": "1",
            "ACLEMU_DELAY_US": "50",
        },
    ),
}


CUDA = "cuda"


def check(
    program: str,
    mode: str,
    profile: str,
    directory: Path,
    settings: Mapping[str, str] | None = None,
) -> None:
    if profile == CUDA:
        environment = {"EMULATED_BACKEND": "cuda", "ACLEMU_CHECK_SRC": "1", "ACLEMU_DELAY_US": "50"}
        folder = cuda(mode)
    else:
        release, rules = PROFILES[profile]
        environment = {"ACLEMU_STRICT_INIT": "1", **rules}
        folder = ascend(mode, release)
    run_program(
        PROGRAMS / f"{program}.c",
        mode,
        directory,
        {
            "LD_LIBRARY_PATH": str(folder),
            **(SANITIZED if mode != "plain" else {}),
            **environment,
            **(settings or {}),
        },
    )


@pytest.mark.parametrize("profile", [*PROFILES, CUDA])
def test_loads_and_gathers_are_right(profile: str, tmp_path: Path) -> None:
    check("test_accelerators", "plain", profile, tmp_path)


@pytest.mark.parametrize("profile", ["newest", "cann_8.0", CUDA])
def test_every_failure_is_explained_and_leaves_nothing(profile: str, tmp_path: Path) -> None:
    check("test_accelerator_faults", "plain", profile, tmp_path)


@pytest.mark.parametrize(
    ("profile", "mode"), [("newest", "plain"), (CUDA, "plain"), (CUDA, "asan"), (CUDA, "tsan")]
)
def test_files_in_memory_may_be_registered(profile: str, mode: str, tmp_path: Path) -> None:
    check("test_accelerator_registered", mode, profile, tmp_path)


@pytest.mark.parametrize("profile", ["newest", CUDA])
def test_copies_overlap_reads(profile: str, tmp_path: Path) -> None:
    rate = {"ACLEMU_H2D_MBPS": "64", "ACLEMU_DELAY_US": "0"}
    check("test_accelerator_overlap", "plain", profile, tmp_path, rate)


@pytest.mark.parametrize(
    ("program", "mode"),
    [
        ("test_accelerators", "asan"),
        ("test_accelerators", "tsan"),
        ("test_accelerator_faults", "asan"),
    ],
)
def test_sanitizers_find_nothing(program: str, mode: str, tmp_path: Path) -> None:
    check(program, mode, "delayed", tmp_path)

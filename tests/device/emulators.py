"""Emulated runtimes, built once a session for each way of compiling."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.native.build import BUILD, MODES, ROOT
from tests.npu_emulator.build import build

# A sanitizer's own memory leaves little room for the windows of devices.
SANITIZED = {"ACLEMU_WINDOW_MB": "512", "ACLEMU_ANY_VA": "1"}


@cache
def ascend(mode: str, release: str) -> Path:
    """The folder of an emulated ``libascendcl.so`` with the names of a release of CANN."""
    folder = BUILD / mode / f"cann-{release}"
    build(folder, cann=release, flags=MODES[mode])
    return folder


@cache
def cuda(mode: str) -> Path:
    """The folder of an emulated ``libcudart.so.13``, which is the Ascend one under CUDA's names."""
    folder = BUILD / mode / "cudart"
    build(
        folder,
        flags=[*MODES[mode], f"-I{ROOT / 'native' / 'src'}"],
        name="libcudart.so.13",
        more=[Path(__file__).parent / "cudart" / "cudart.c"],
    )
    return folder

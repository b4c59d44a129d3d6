"""The whole native build: cffi's `ffibuilder`, and the two setuptools commands that finish the wheel.

`native/include/sllm.h` is the one declaration of the library's interface: the text between its
`/* [cdef] */` marks is what cffi reads. Building needs a C compiler, and neither CANN nor CUDA.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build_ext import build_ext as _build_ext

ROOT = Path(__file__).resolve().parent
HEADER = ROOT / "native" / "include" / "sllm.h"
SOURCES = sorted(f"native/src/{path.name}" for path in (ROOT / "native" / "src").glob("*.c"))
FLAGS = ["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Wshadow", "-fvisibility=hidden"]


def declarations() -> str:
    """The marked part of the header, as cffi's parser wants it."""
    parts = HEADER.read_text().split("/* [cdef] */")
    if len(parts) != 3:
        raise SystemExit(f"{HEADER} must hold exactly two [cdef] marks")
    return re.sub(r"/\*.*?\*/", "", parts[1], flags=re.DOTALL)


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "sllmctl._native",
    '#include "sllm.h"',
    sources=SOURCES,
    include_dirs=["native/include"],
    extra_compile_args=FLAGS,
    libraries=["pthread"],
    # One wheel serves CPython 3.10 and later.
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    py_limited_api=True,
)


class build_ext(_build_ext):  # noqa: N801 - setuptools' name
    """Let cffi write the module's C source, and compile that with the library."""

    def finalize_options(self) -> None:
        generated = Path(self.get_finalized_command("build").build_temp)
        extension = ffibuilder.distutils_extension(str(generated), verbose=False)
        # setuptools looks at the sources alone, and would miss a changed header.
        extension.depends = [str(path) for path in (ROOT / "native").rglob("*.h")]
        extension.py_limited_api = True
        self.distribution.ext_modules = [extension]
        super().finalize_options()


class bdist_wheel(_bdist_wheel):  # noqa: N801 - setuptools' name
    """Tag the wheel for every CPython from 3.10 on."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310"
        super().finalize_options()

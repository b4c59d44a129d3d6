"""The whole native build: cffi's `ffibuilder`, and the setuptools commands that finish the wheel.

`native/include/sllm.h` is the one declaration of the library's interface: the text between its
`/* [cdef] */` marks is what cffi reads. Building needs a C compiler, and neither CANN nor CUDA.
"""

from __future__ import annotations

import re
import sysconfig
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
    libraries=["pthread", "dl"],  # of their own before glibc 2.34
    # One wheel serves CPython 3.10 and later.
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    py_limited_api=True,
)


class build_ext(_build_ext):  # noqa: N801 - setuptools' name
    """Let cffi write the module's C source, and compile that with the library."""

    def finalize_options(self) -> None:
        """Say what is compiled, and how."""
        generated = Path(self.get_finalized_command("build").build_temp)
        extension = ffibuilder.distutils_extension(str(generated), verbose=False)
        # setuptools looks at the sources alone, and would miss a changed header.
        extension.depends = [str(path) for path in (ROOT / "native").rglob("*.h")]
        extension.py_limited_api = True
        # Debug information names sources, not places of the machine that built them.
        for place in (ROOT, generated.resolve(), sysconfig.get_path("include")):
            extension.extra_compile_args.append(f"-ffile-prefix-map={place}=.")
        self.distribution.ext_modules = [extension]
        super().finalize_options()

    def build_extensions(self) -> None:
        """Compile and link."""
        # Some interpreters ask for a search path to their own library, which we do not link.
        linker = self.compiler.linker_so
        self.compiler.linker_so = [part for part in linker if not part.startswith("-Wl,-rpath")]
        super().build_extensions()


class bdist_wheel(_bdist_wheel):  # noqa: N801 - setuptools' name
    """Tag the wheel for every CPython from 3.10 on."""

    def finalize_options(self) -> None:
        """Say which interpreters may use it."""
        self.py_limited_api = "cp310"
        super().finalize_options()

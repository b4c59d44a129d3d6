"""Build the emulated Ascend runtime, and for torch_npu the other libraries that it links.

python -m tests.npu_emulator.build OUT                                # for the native library
python -m tests.npu_emulator.build OUT --torch-npu SITE_PACKAGES      # and for torch_npu
python -m tests.npu_emulator.build OUT --cann 8.1                     # without newer names
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.c"))
FLAGS = ["-std=c11", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
CANN = {"8.0": 800, "8.1": 810, "8.3": 830, "8.5": 850, "9.0": 900}

# Which of CANN's libraries has a symbol that torch_npu wants; the first pattern that fits.
HOMES = (
    ("libhccl.so", re.compile(r"[Hh]ccl")),
    ("libacl_op_compiler.so", re.compile(r"aclop|aclGenGraph|aclSetCompile|aclGetCompile")),
    ("libge_runner.so", re.compile(r"_ZN?K?2ge")),
    ("libascendcl.so", re.compile(r"")),
)
NOT_CANN = re.compile(
    r"(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so|ld-linux|libtorch|libc10|libnpu_profiler"
    r"|libtensorpipe)"
)
TORCH_NPU_LIBRARIES = ("libtorch_npu.so", "libtensorpipe.so", "libnpu_profiler.so")
SYSTEM_LIBRARIES = (
    *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"),
    *("libstdc++.so.6", "libgcc_s.so.1"),
)
LINKER_SYMBOLS = {"__tls_get_addr", "_r_debug"}
NOT_FOUND = 200006  # what a stub answers; the harmless ones say that all is well
HARMLESS = re.compile(r"Create|Set|Destroy|Msprof")
STUBS_HEAD = """\
/* Generated: calls that torch_npu links and that are not emulated. Each says so, and fails. */
#include <stdio.h>
#include <stdlib.h>
#define STUB(id, name, result) \\
    __attribute__((visibility("default"))) long id(void) __asm__(name); \\
    long id(void) \\
    { \\
        static int seen; \\
        if (seen++ == 0 && getenv("ACLEMU_TRACE") != NULL) { \\
            fprintf(stderr, "[aclemu] stub %s\\n", name); \\
        } \\
        return result; \\
    }
"""


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compiler() -> str:
    return os.environ.get("CC", "gcc")


def _link(target: Path, sources: Iterable[Path], *flags: str) -> None:
    command = [_compiler(), *FLAGS, f"-Wl,-soname,{target.name}", "-o", str(target)]
    done = subprocess.run(
        [*command, *map(str, sources), *flags], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{target.name}:\n{done.stderr}")


def build(
    folder: Path,
    *,
    cann: str = "9.0",
    flags: Sequence[str] = ("-O2",),
    name: str = "libascendcl.so",
    more: Sequence[Path] = (),
) -> Path:
    """Compile ``libascendcl.so`` for programs that find it at run time.

    Args:
        folder: Where to put it; made if it is not there.
        cann: Which release's names there are.
        flags: For the compiler: optimisation, sanitizers.
        name: Another name for it.
        more: Sources to link with it.

    Returns:
        The library.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    defined = f"-DEMU_CANN={CANN[cann]}"
    _link(target, [*SOURCES, *more], *WARNINGS, defined, f"-I{HERE}", *flags)
    return target


def _symbols(library: Path, which: str) -> set[str]:
    lines = _output("nm", "-D", which, str(library)).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if " w " not in line}


def _needed(library: Path) -> list[str]:
    return re.findall(r"NEEDED.*\[(.*?)\]", _output("readelf", "-d", str(library)))


def _defined_elsewhere(site_packages: Path) -> set[str]:
    found = set(LINKER_SYMBOLS)
    for library in (site_packages / "torch" / "lib").glob("*.so*"):
        found |= _symbols(library, "--defined-only")
    for name in SYSTEM_LIBRARIES:
        path = Path(_output(_compiler(), f"-print-file-name={name}").strip())
        if path.exists():
            found |= _symbols(path, "--defined-only")
    return found


def build_for_torch_npu(
    folder: Path, site_packages: Path, *, torch: Path | None = None, cann: str = "9.0"
) -> dict[str, int]:
    """Compile every library of CANN that torch_npu's own libraries name as needed.

    What is not emulated is a stub, generated from the symbols that nothing else defines.

    Args:
        folder: Where to put them: for ``LD_LIBRARY_PATH``.
        site_packages: Where torch_npu is installed.
        torch: Where torch is; not given, beside it.
        cann: Which release's names there are.

    Returns:
        The number of stubs in each library.
    """
    emulated = build(folder, cann=cann)
    home = site_packages / "torch_npu"
    users = [home / "lib" / name for name in TORCH_NPU_LIBRARIES]
    users = [user for user in [*users, *home.glob("_C.*.so")] if user.exists()]
    known = _defined_elsewhere(torch or site_packages) | _symbols(emulated, "--defined-only")
    for user in users:
        known |= _symbols(user, "--defined-only")
    wanted: set[str] = set()
    names = {"libascendcl.so"}
    for user in users:
        undefined = _symbols(user, "--undefined-only") - known
        wanted |= {name for name in undefined if not name.startswith(("Py", "_Py"))}
        names |= {name for name in _needed(user) if not NOT_CANN.match(name)}
    stubs: dict[str, list[str]] = {name: [] for name in names}
    for symbol in sorted(wanted):
        library = next(name for name, pattern in HOMES if pattern.match(symbol))
        stubs.setdefault(library, []).append(symbol)
    # The others depend on libascendcl, as in CANN: torch_npu looks some names up through them.
    for name in sorted(stubs, key=lambda name: name != "libascendcl.so"):
        source = folder / f"{name}.stubs.c"
        lines = [
            f'STUB(stub_{i}, "{symbol}", {0 if HARMLESS.search(symbol) else NOT_FOUND})\n'
            for i, symbol in enumerate(stubs[name])
        ]
        source.write_text(STUBS_HEAD + "".join(lines))
        if name == "libascendcl.so":
            _link(folder / name, [*SOURCES, source], f"-DEMU_CANN={CANN[cann]}", "-O2")
        else:
            _link(folder / name, [source], "-Wl,--no-as-needed", str(folder / "libascendcl.so"))
    return {name: len(symbols) for name, symbols in stubs.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch-npu", type=Path, metavar="SITE_PACKAGES")
    parser.add_argument("--torch", type=Path, metavar="SITE_PACKAGES", help="if not the same")
    parser.add_argument("--cann", choices=CANN, default="9.0", help="whose names there are")
    options = parser.parse_args()
    if options.torch_npu is None:
        print(build(options.folder, cann=options.cann))
        return
    for name, count in build_for_torch_npu(
        options.folder, options.torch_npu, torch=options.torch, cann=options.cann
    ).items():
        print(f"{options.folder / name}: {count} stubs")


if __name__ == "__main__":
    main()

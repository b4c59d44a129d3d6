"""Assert our prototypes and constants of AscendCL against an installed CANN's headers.

python -m tests.device.acl_header /usr/local/Ascend/ascend-toolkit/latest/include
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.native.build import ROOT, compiler

CHECK = Path(__file__).parent / "header" / "check_acl.c"


def differences(include: Path) -> str:
    """What the compiler says when it compiles both sets of declarations; empty: they agree."""
    # Deprecated or not, and whether an enumeration or the integer it is made of was written, makes
    # no difference to a caller.
    flags = ["-std=c11", "-Wall", "-Werror", "-Wno-deprecated-declarations"]
    flags += ["-Wno-unknown-warning-option", "-Wno-enum-int-mismatch"]
    done = subprocess.run(
        [
            *(compiler(), *flags, "-fsyntax-only"),
            *("-isystem", str(include), f"-I{ROOT / 'native' / 'src'}", str(CHECK)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr if done.returncode != 0 else ""


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.device.acl_header FOLDER, which holds acl/acl.h")
    include = Path(sys.argv[1])
    if not (include / "acl" / "acl.h").exists():
        raise SystemExit(f"{include / 'acl' / 'acl.h'} is not there")
    said = differences(include)
    if said:
        raise SystemExit(f"native/src/acl_abi.h and {include} differ:\n{said}")
    print(f"native/src/acl_abi.h agrees with {include}")


if __name__ == "__main__":
    main()

"""How a command ends when something happens that no command expects."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def end(body: str) -> tuple[int, str]:
    """Run `main` with a body in the place of the commands; return exit code and stderr."""
    script = f"import sllmctl.cli as cli\ndef app(**_):\n    {body}\ncli.app = app\ncli.main()\n"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


def test_ctrl_c_before_a_command_has_begun() -> None:
    assert end("raise KeyboardInterrupt") == (130, "interrupted\n")


def test_ctrl_c_while_the_command_line_is_imported_shows_no_traceback() -> None:
    script = """
import os, signal, sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
from sllmctl.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_in_a_finalizer_is_not_lost() -> None:
    body = "class Dies:\n        def __del__(self): raise KeyboardInterrupt\n    Dies()\n"
    assert end(body + "    import time; time.sleep(30)") == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        ("PermissionError(13, 'Permission denied', '/x')", 1, "error: Permission denied: `/x`"),
        ("MemoryError()", 1, "error: this machine gave no more memory"),
        ("ImportError('libtorch.so: bad')", 4, "error: cannot import a library: libtorch.so: bad"),
        ("OSError(9, 'Bad file descriptor')", 70, "error: unexpected OSError: [Errno 9]"),
        ("KeyError('x')", 70, "error: unexpected KeyError: 'x'"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(raised: str, code: int, line: str) -> None:
    ended, errors = end(f"raise {raised}")
    assert ended == code
    assert errors.startswith(line)
    assert ("this is a bug" in errors) == (code == 70)


def test_names_that_are_no_utf8_are_converted_listed_and_named(
    sllmctl: Run, tiny_checkpoint: Path
) -> None:
    source = Path(os.fsdecode(os.fsencode(tiny_checkpoint) + b"\xff"))
    tiny_checkpoint.rename(source)
    (source / os.fsdecode(b"notes\xfe.txt")).touch()
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    done = sllmctl("convert", source, "--json", **strict)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["path"] == f"models/{source.name}"
    assert document["warnings"] == [
        r"`notes\udcfe.txt` has a name that is not UTF-8 and is not copied"
    ]
    listed = sllmctl("ls", "--json", **strict)
    assert [m["name"] for m in json.loads(listed.stdout)["models"]] == [source.name]
    assert sllmctl("load", source.name, "--quiet", **strict).returncode == 0
    assert sllmctl("verify", source.name, "--json", **strict).returncode == 0

"""Tab completion: the script that `--install-completion` installs, and what it asks for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MODULE = [sys.executable, "-m", "sllmctl"]


def completed(words: str) -> list[str]:
    """What follows these words, as bash asks for it."""
    asked = {
        "_SLLMCTL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        MODULE, env=os.environ | asked, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sllmctl ve", ["verify"]),
        ("sllmctl serve --mem", ["--mem-pool-size"]),
        ("sllmctl convert --hub mod", ["modelscope"]),
    ],
)
def test_commands_options_and_choices_are_completed(words: str, expected: list[str]) -> None:
    assert completed(words) == expected


def test_the_script_for_bash_is_one_for_sllmctl() -> None:
    asked = {"_SLLMCTL_COMPLETE": "source_bash"}
    done = subprocess.run(
        MODULE, env=os.environ | asked, stdout=subprocess.PIPE, text=True, check=True
    )
    assert "_SLLMCTL_COMPLETE=complete_bash" in done.stdout
    assert done.stdout.strip().endswith("-F _sllmctl_completion sllmctl")
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)

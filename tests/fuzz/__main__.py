"""Fuzz every reader: `python -m tests.fuzz --inputs 1000000`.

With atheris, coverage guides the inputs; without it, they are random mutations. An input that fails
is kept in tests/data/regress/, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.plain import fuzz
from tests.fuzz.targets import REGRESS, TARGETS


def run_guided(target: str, inputs: int) -> str | None:
    """Run atheris in a process of its own; return what went wrong."""
    with TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.guided", target, str(inputs), directory],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        print("".join(_summary(done.stdout)), end="", flush=True)
        found = [p for p in Path(directory).iterdir() if p.is_file()]
        for path in found:
            (REGRESS / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, REGRESS / target / path.name)
        if done.returncode == 0 and not found:
            return None
        return f"exit {done.returncode}, {len(found)} inputs kept\n{done.stdout[-4000:]}"


def _summary(output: str) -> list[str]:
    """libFuzzer's own figures: coverage at the end, inputs, peak memory."""
    lines = [line for line in output.splitlines() if re.search(r"\bcov: \d+", line)][-1:]
    lines += [line for line in output.splitlines() if line.startswith("stat::")]
    return [f"  {line.strip()}\n" for line in lines]


def run_plain(target: str, inputs: int) -> str | None:
    """Run without guidance; return what went wrong."""
    try:
        fuzz(target, inputs=inputs, seed=time.time_ns())
    except AssertionError as exc:
        return str(exc)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each target")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--plain", action="store_true", help="do without atheris")
    arguments = parser.parse_args()
    guided = not arguments.plain and importlib.util.find_spec("atheris") is not None
    failed = False
    for target in arguments.target or sorted(TARGETS):
        started = time.monotonic()
        how = "guided by coverage" if guided else "mutated at random"
        print(f"{target}: {arguments.inputs} inputs, {how}", flush=True)
        problem = (run_guided if guided else run_plain)(target, arguments.inputs)
        print(f"  {problem or 'no failure'}, {time.monotonic() - started:.0f} s", flush=True)
        failed = failed or problem is not None
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

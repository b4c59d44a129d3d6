"""Build and run C test programs with the native library's sources, plain and with sanitizers."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native-tests"
LIBRARY = sorted((ROOT / "native" / "src").glob("*.c"))
HELPERS = [ROOT / "tests" / "native" / name for name in ("check.c", "files.c", "system.c")]
HELPERS += [ROOT / "tests" / "native" / name for name in ("loads.c", "fake_device.c")]
INCLUDES = ("native/include", "native/src", "tests/native")
FLAGS = [
    *("-std=c11", "-g", "-pthread"),
    *("-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wno-sign-conversion", "-Werror"),
    *(f"-I{ROOT / folder}" for folder in INCLUDES),
]
_SANITIZED = ["-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
MODES = {
    "plain": ["-O2"],
    "asan": [*_SANITIZED, "-fsanitize=address,undefined"],
    "tsan": [*_SANITIZED, "-fsanitize=thread"],
}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "second_deadlock_stack=1:history_size=4",
}
TIMEOUT_S = 600


def compiler() -> str:
    """The C compiler: ``$CC``, else gcc."""
    return os.environ.get("CC", "gcc")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _is_current(target: Path, sources: Iterable[Path]) -> bool:
    if not target.exists():
        return False
    built = target.stat().st_mtime_ns
    return all(source.stat().st_mtime_ns < built for source in sources)


def build_programs(mode: str, programs: list[Path]) -> dict[str, Path]:
    """Compile what has changed since the last time.

    Every other C file beside the programs is part of each of them.

    Returns:
        The executable of each program, by the name of its source without the suffix.
    """
    folder = BUILD / mode
    folder.mkdir(parents=True, exist_ok=True)
    headers = [path for part in INCLUDES for path in (ROOT / part).glob("*.h")]
    headers.append(Path(__file__))

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.parent.name}-{source.parent.name}-{source.stem}.o"
        if not _is_current(target, [source, *headers]):
            _run([compiler(), *FLAGS, *MODES[mode], "-c", str(source), "-o", str(target)])
        return target

    beside = {path for program in programs for path in program.parent.glob("*.c")}
    own_helpers = sorted(path for path in beside if not path.name.startswith("test_"))
    helpers = [*HELPERS, *(path for path in own_helpers if path not in HELPERS)]
    headers += [path for program in programs for path in program.parent.glob("*.h")]
    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shared = list(pool.map(compile_one, [*LIBRARY, *helpers]))
        objects = list(pool.map(compile_one, programs))

        def link_one(program: Path, own: Path) -> Path:
            target = folder / program.stem
            if not _is_current(target, [own, *shared]):
                parts = [str(part) for part in (own, *shared)]
                _run([compiler(), *FLAGS, *MODES[mode], *parts, "-ldl", "-o", str(target)])
            return target

        linked = list(pool.map(link_one, programs, objects))
    return {program.stem: path for program, path in zip(programs, linked, strict=True)}


def launcher(mode: str) -> list[str] | str:
    """How to start a program of a mode: a command to put in front.

    Returns:
        The command, mostly empty; or a text, why this machine cannot start the sanitizer at all.
    """
    probe = BUILD / mode / "starts"
    source = probe.with_suffix(".c")
    probe.parent.mkdir(parents=True, exist_ok=True)
    if not probe.exists():
        source.write_text("int main(void) { return 0; }\n")
        try:
            _run([compiler(), *MODES[mode], str(source), "-o", str(probe)])
        except RuntimeError as exc:
            return f"the compiler has no such sanitizer: {str(exc).splitlines()[-1]}"
    # Old sanitizer runtimes do not know the address layouts of kernels with more randomness.
    for front in ([], ["setarch", "-R"]):
        done = subprocess.run([*front, str(probe)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return front
    return f"the sanitizer's runtime does not start: {done.stderr.strip()[:200]}"


def run_program(
    source: Path, mode: str, directory: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Build and run a program with its files below a directory.

    Args:
        source: The program; everything else in its folder is built, too.
        mode: Of `MODES`.
        directory: For its files.
        environment: Variables beside the process's own.

    Raises:
        AssertionError: A test in it failed, or a sanitizer had something to say.
    """
    front = launcher(mode)
    if isinstance(front, str):
        pytest.skip(front)
    program = build_programs(mode, sorted(source.parent.glob("test_*.c")))[source.stem]
    done = subprocess.run(
        [*front, str(program), str(directory)],
        env={**os.environ, **SANITIZER_OPTIONS, **(environment or {})},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S * int(os.environ.get("SLLM_TEST_ROUNDS", "1")),
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "ok " in done.stdout

"""A conversion killed at any step leaves the old state or the new one, and a rerun completes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from sllmctl.core.verify import verify
from sllmctl.core.write import assemble
from sllmctl.core.write.convert import convert
from sllmctl.core.write.target import Target
from tests.convert.conftest import TENSORS, assert_same_tensors, files_of, only_child

ROOT = Path(__file__).parents[2]
RunKilled = Callable[..., bool]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: these tests sync thousands of times."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def run_killed() -> Iterator[RunKilled]:
    """Tells whether a conversion was killed at a step, and did not end before that."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.convert.killed"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(at: int, source: Path, target: Path, *options: str) -> bool:
            print(
                json.dumps([at, str(source), str(target), *options]), file=server.stdin, flush=True
            )
            status = int(server.stdout.readline())
            assert status in (0, -signal.SIGKILL)
            return status != 0

        yield run
        server.stdin.close()


def state_of(target: Path) -> str:
    """What is at the target: nothing, the old checkpoint or the new one. A half one fails."""
    if not target.exists():
        return "nothing"
    assert verify(target).problems == ()
    assert_same_tensors(target, TENSORS)
    return "old" if (target / "old.txt").exists() else "new"


def test_killed_at_every_step_of_a_first_conversion(
    source: Path, target: Path, run_killed: RunKilled
) -> None:
    seen = []
    at = 1
    while run_killed(at, source, target):
        seen.append(state_of(target))
        if seen[-1] == "nothing":
            convert(source, target, max_shard_bytes=10_000)
        assert state_of(target) == "new"
        # A stale lock file may be left by a kill at the very end; nothing else may.
        left = {path.name for path in target.parent.iterdir()} - {target.name}
        assert left <= {f".{target.name}.partial.lock"}
        shutil.rmtree(target.parent)
        at += 1
    assert at > 30
    assert seen == sorted(seen, key=("nothing", "new").index)


@pytest.mark.parametrize("how", ["exchange", "two-renames"])
def test_killed_at_every_step_of_a_replacement(
    source: Path, target: Path, how: str, run_killed: RunKilled
) -> None:
    (source / "old.txt").touch()
    old = target.with_name("old")
    convert(source, old)
    (source / "old.txt").unlink()
    seen = set()
    at = 30  # what comes before is the same as in a first conversion
    while True:
        shutil.copytree(old, target)
        killed = run_killed(at, source, target, "force", how)
        state = state_of(target)
        seen.add(state)
        if not killed:
            break
        if state == "nothing":
            # Between two renames; the next start brings the old one back before anything else.
            with Target(target, fingerprint="f", force=True):
                assert state_of(target) == "old"
        convert(source, target, max_shard_bytes=10_000, force=True)
        assert state_of(target) == "new"
        assert {path.name for path in target.parent.iterdir()} == {"old", target.name}
        shutil.rmtree(target)
        at += 1
    assert state == "new"
    assert seen == ({"old", "new"} if how == "exchange" else {"old", "new", "nothing"})


def test_complete_shards_are_kept_by_the_next_conversion(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, run_killed: RunKilled
) -> None:
    partial = target.with_name(f".{target.name}.partial")
    at = 1
    while not (partial / ".sllmctl-state").exists() or (
        len((partial / ".sllmctl-state").read_text().splitlines()) < 2
    ):
        assert run_killed(at, source, target)
        at += 1
    kept = [json.loads(line)["name"] for line in _state(partial)[1:]]
    written: list[str] = []
    write_shards = assemble.write_shards

    def note(shards: list[tuple[object, object]], *args: object, **kwargs: object) -> None:
        written.extend(layout.name for layout, _ in shards)  # type: ignore[attr-defined]
        write_shards(shards, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(assemble, "write_shards", note)
    result = convert(source, target, max_shard_bytes=10_000)
    assert result.resumed == len(kept) > 0
    assert not set(kept) & set(written)
    assert len(kept) + len(written) == result.shards
    assert state_of(target) == "new"
    assert only_child(target.parent) == target


def test_a_torn_line_of_the_state_loses_that_shard_alone(source: Path, target: Path) -> None:
    convert(source, target, max_shard_bytes=10_000)
    reference = files_of(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(target)
    with pytest.raises(KeyboardInterrupt), _left_behind():
        convert(source, target, max_shard_bytes=10_000, progress=_interrupt_at_verify)
    lines = _state(partial)
    torn = "\n".join(lines[:-1]) + "\n" + lines[-1][: len(lines[-1]) // 2]
    (partial / ".sllmctl-state").write_text(torn)
    result = convert(source, target, max_shard_bytes=10_000)
    assert result.resumed == len(lines) - 2
    assert files_of(target) == reference


def test_a_kept_shard_that_was_damaged_is_found_by_the_read_back(
    source: Path, target: Path
) -> None:
    partial = target.with_name(f".{target.name}.partial")
    with pytest.raises(KeyboardInterrupt), _left_behind():
        convert(source, target, progress=_interrupt_at_verify)
    shard = partial / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Exception, match="does not read back as it was written"):
        convert(source, target)
    assert convert(source, target).resumed == 0


def _interrupt_at_verify(stage: str, done: int, total: int) -> None:
    if stage == "verify":
        raise KeyboardInterrupt


def _state(partial: Path) -> list[str]:
    return (partial / ".sllmctl-state").read_text().splitlines()


@contextmanager
def _left_behind() -> Iterator[None]:
    """Let an interrupted conversion leave its partial directory, as a kill does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "__exit__", lambda made, *_: made._release())
        yield

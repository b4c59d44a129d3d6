"""The target takes its place in one step, and only one conversion fills it at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.write import target as target_module
from sllmctl.core.write.convert import convert
from sllmctl.core.write.target import Target
from sllmctl.errors import CheckpointError, ConfigError
from tests.convert.conftest import TENSORS, assert_same_tensors, files_of, only_child


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.partial{suffix}")


def test_an_empty_directory_may_be_there(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    convert(source, target)
    assert_same_tensors(target, TENSORS)


def test_a_directory_with_anything_in_it_is_not_touched(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ConfigError, match="is there already"):
        convert(source, target)
    with pytest.raises(ConfigError, match="holds 1 entries and no model: it is not replaced"):
        convert(source, target, force=True)
    assert files_of(target) == {"thesis.txt": b"irreplaceable"}


def test_a_file_is_not_replaced(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.write_text("x")
    for force in (False, True):
        with pytest.raises(ConfigError, match="is not a directory"):
            convert(source, target, force=force)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_force_replaces_a_checkpoint(
    source: Path, target: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(target_module, "exchange", lambda *_: False)
        monkeypatch.setattr(target_module, "rename_new", lambda *_: False)
    convert(source, target)
    (target / "stale.txt").touch()
    convert(source, target, max_shard_bytes=8000, force=True)
    assert_same_tensors(target, TENSORS)
    assert not (target / "stale.txt").exists()
    assert only_child(target.parent) == target


def test_a_link_to_a_directory_keeps_pointing_there(
    source: Path, target: Path, tmp_path: Path
) -> None:
    real = tmp_path / "disk2" / "model"
    real.mkdir(parents=True)
    target.parent.mkdir(parents=True)
    target.symlink_to(real)
    convert(source, target)
    assert target.is_symlink()
    assert_same_tensors(real, TENSORS)


def test_something_that_appears_meanwhile_is_not_replaced(target: Path) -> None:
    with Target(target, fingerprint="f", force=False) as made:
        (made.directory / "x").touch()
        target.mkdir()
        (target / "y").touch()
        with pytest.raises(ConfigError, match="is there already"):
            made.publish()
    assert files_of(target) == {"y": b""}
    assert only_child(target.parent) == target


def test_an_interrupted_pair_of_renames_is_repaired(source: Path, target: Path) -> None:
    convert(source, target)
    before = files_of(target)
    # The first of two renames had come, the second had not.
    target.rename(beside(target, ".old"))
    beside(target, "").mkdir()
    with (
        pytest.raises(ConfigError, match="is there already"),
        Target(target, fingerprint="f", force=False),
    ):
        pass
    assert files_of(target) == before
    assert not beside(target, ".old").exists()


def test_what_was_replaced_is_removed_by_the_next_start(source: Path, target: Path) -> None:
    convert(source, target)
    # Both renames had come, the removal had not.
    beside(target, ".old").mkdir()
    (beside(target, ".old") / "model.safetensors").touch()
    convert(source, target, max_shard_bytes=8000, force=True)
    assert only_child(target.parent) == target


def test_a_running_conversion_is_named(source: Path, target: Path) -> None:
    with Target(target, fingerprint="f", force=False) as made:
        (made.directory / "x").touch()
        with pytest.raises(ConfigError, match=rf"is running \(pid {os.getpid()}\)"):
            convert(source, target)
        assert (made.directory / "x").exists()
    convert(source, target)


def test_a_lock_that_its_holder_removed_is_not_trusted(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our open and our lock the last holder finishes, and removes the file."""
    flock = fcntl.flock
    calls = []

    def slip_in(fd: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            beside(target, ".lock").unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", slip_in)
    with Target(target, fingerprint="f", force=False):
        assert len(calls) == 2
        fd = os.open(beside(target, ".lock"), os.O_RDWR)
        with pytest.raises(BlockingIOError):
            flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


def test_a_stale_lock_stops_nobody(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True)
    beside(target, ".lock").write_text("1\n")
    convert(source, target)
    assert only_child(target.parent) == target


def test_a_partial_directory_of_another_conversion_is_discarded(source: Path, target: Path) -> None:
    partial = beside(target, "")
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_text("half")
    (partial / "other").mkdir()
    (partial / ".sllmctl-state").write_text('{"fingerprint": "another"}\n')
    convert(source, target)
    assert_same_tensors(target, TENSORS)
    assert "other" not in files_of(target)


def test_what_is_not_finished_is_no_checkpoint(source: Path, target: Path) -> None:
    convert(source, target)
    (target / ".sllmctl-state").write_text('{"fingerprint": "x"}\n')
    with pytest.raises(CheckpointError, match="a conversion has not finished"):
        open_checkpoint(target)
    with pytest.raises(CheckpointError, match="a conversion has not finished"):
        convert(target, target.parent / "other")


def test_a_link_in_place_of_the_partial_directory_is_not_followed(
    source: Path, target: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    target.parent.mkdir(parents=True)
    beside(target, "").symlink_to(victim)
    convert(source, target)
    assert (victim / "file").exists()
    assert_same_tensors(target, TENSORS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="cannot write to .*Permission denied"):
        convert(source, tmp_path / "closed" / "x")


def test_a_place_below_a_file_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write to .*\(E(EXIST|NOTDIR)\)"):
        convert(source, tmp_path / "file" / "x" / "y")

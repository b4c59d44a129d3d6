"""A full disk is said before or when it happens, and nothing is left."""

from __future__ import annotations

import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sllmctl.core.write import writer
from sllmctl.core.write.convert import convert
from sllmctl.core.write.save import save_tensors
from sllmctl.errors import CheckpointError, ConfigError
from tests.conftest import write_checkpoint
from tests.convert.conftest import files_of

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "sllmctl-test", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a filesystem can be mounted only with the right to do so")
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.fixture
def large_source(tmp_path: Path) -> Path:
    return write_checkpoint(
        tmp_path / "source", {"model.safetensors": {"a": torch.randn(3_000_000)}}
    )


def test_too_little_space_is_said_before_anything_is_written(
    large_source: Path, small_disk: Path
) -> None:
    with pytest.raises(ConfigError, match=r"needs 13052672 bytes of disk space, and \d+ are free"):
        convert(large_source, small_disk / "model")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("can_reserve", [True, False])
def test_a_disk_that_fills_up_names_file_and_byte(
    large_source: Path, small_disk: Path, can_reserve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**40))
    if not can_reserve:
        monkeypatch.setattr(writer, "preallocate", lambda *_: False)
    with pytest.raises(
        CheckpointError,
        match=r"cannot write `.*/model.safetensors` at byte \d+: No space left .* \(ENOSPC\)",
    ) as caught:
        convert(large_source, small_disk / "model")
    assert ("at byte 0:" in str(caught.value)) == can_reserve
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_with_other_files(
    large_source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (large_source / "tokenizer.model").write_bytes(bytes(6_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**40))
    with pytest.raises(CheckpointError, match=r"cannot write `.*tokenizer.model` at byte 4\d+: No"):
        convert(large_source, small_disk / "model")
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_leaves_the_old_checkpoint(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors({"a": torch.ones(100_000)}, small_disk / "model")
    before = files_of(small_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**40))
    with pytest.raises(CheckpointError, match="ENOSPC"):
        save_tensors({"a": torch.ones(2_000_000)}, small_disk / "model")
    assert files_of(small_disk) == before


def test_a_mount_point_is_refused_before_anything_is_written(
    large_source: Path, small_disk: Path
) -> None:
    with pytest.raises(ConfigError, match="is a mount point") as caught:
        convert(large_source, small_disk)
    assert caught.value.hint == "choose a directory inside it"
    assert {path.name for path in small_disk.parent.iterdir()} == {"disk", "source"}

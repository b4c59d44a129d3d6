"""The command line and sllm-store's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.sllm_store import golden_tensors, write_sllm_store


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage path with one model of sllm-store's."""
    write_sllm_store(tmp_path / "models" / "org" / "old", golden_tensors())
    return tmp_path / "models"


def test_it_is_listed_loaded_and_verified(sllmctl: Run, storage: Path) -> None:
    listed = sllmctl("ls", "--storage-path", storage)
    assert "by sllm-store" in listed.stdout
    (row,) = json.loads(sllmctl("ls", "--storage-path", storage, "--json").stdout)["models"]
    assert row["format"] == "sllm-store"
    assert row["converted"] is False
    assert row["tensors"] == len(golden_tensors())
    loaded = json.loads(
        sllmctl("load", "org/old", "--storage-path", storage, "--store", "off", "--json").stdout
    )
    assert sum(loaded["bytes_from"].values()) == loaded["bytes"] == row["bytes"]
    checked = sllmctl("verify", "org/old", "--storage-path", storage)
    assert checked.returncode == 0
    assert "structure checked" in checked.stdout
    assert "no offset" in checked.stderr


def test_damage_is_exit_3_and_one_line_of_an_error(sllmctl: Run, storage: Path) -> None:
    (storage / "org" / "old" / "tensor.data_0").write_bytes(b"")
    checked = sllmctl("verify", "org/old", "--storage-path", storage)
    assert checked.returncode == 3
    assert "`tensor.data_0` is empty" in checked.stdout
    loaded = sllmctl("load", "org/old", "--storage-path", storage)
    assert loaded.returncode == 1
    assert "`tensor.data_0` is empty" in loaded.stderr
    assert "hint: convert the original model again" in loaded.stderr


def test_convert_goes_both_ways(sllmctl: Run, storage: Path, tmp_path: Path) -> None:
    there = sllmctl("convert", storage / "org" / "old", "-o", tmp_path / "there")
    assert there.returncode == 0, there.stderr
    assert (tmp_path / "there" / "model.safetensors").exists()
    back = sllmctl("convert", tmp_path / "there", "-o", tmp_path / "b", "--format", "sllm-store")
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "b" / "tensor_index.json").exists()
    listed = sllmctl("ls", "--storage-path", tmp_path)
    assert "for sllm-store" in listed.stdout
    assert sllmctl("verify", tmp_path / "b", "--quiet").stdout == "ok\n"
    assert sllmctl("convert", tmp_path / "there", "--format", "gguf").returncode == 2

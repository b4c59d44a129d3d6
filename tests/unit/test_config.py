from __future__ import annotations

from pathlib import Path

import pytest

from sllmctl.core.config import find_models, resolve_model, storage_path
from sllmctl.errors import CheckpointNotFound, ConfigError


def test_storage_path_prefers_what_is_said_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert storage_path() == Path("models")
    monkeypatch.setenv("STORAGE_PATH", "/b")
    assert storage_path() == Path("/b")
    monkeypatch.setenv("SLLMCTL_STORAGE_PATH", "/a")
    assert storage_path() == Path("/a")
    assert storage_path("~/x") == Path.home() / "x"


def test_a_name_is_looked_up_below_the_storage_path(tiny_checkpoint: Path) -> None:
    storage = tiny_checkpoint.parents[1]
    assert resolve_model("org/tiny", storage) == tiny_checkpoint


def test_a_path_is_taken_as_it_is(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert resolve_model("./tiny", "/nowhere") == Path("tiny")
    assert resolve_model(str(tiny_checkpoint)) == tiny_checkpoint
    assert resolve_model(Path("tiny")) == Path("tiny")


def test_an_existing_directory_is_found_where_no_name_is(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert resolve_model("tiny", "/nowhere") == Path("tiny")


def test_a_near_name_is_suggested(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointNotFound) as caught:
        resolve_model("org/tinny", tiny_checkpoint.parents[1])
    assert caught.value.hint == "did you mean `org/tiny`?"


def test_the_owner_may_be_forgotten(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointNotFound) as caught:
        resolve_model("Tiny", tiny_checkpoint.parents[1])
    assert caught.value.hint == "did you mean `org/tiny`?"


def test_an_unknown_hub_name_gets_the_convert_command(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound) as caught:
        resolve_model("Qwen/Qwen3-8B", tmp_path)
    assert "sllmctl convert Qwen/Qwen3-8B" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["a/../../b", "x/..", ""])
def test_a_name_cannot_lead_out_of_the_storage_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        resolve_model(name, tmp_path)


def test_a_missing_path_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="there is no"):
        resolve_model(str(tmp_path / "nothing"))


def test_conversions_in_progress_are_not_models(tiny_checkpoint: Path) -> None:
    storage = tiny_checkpoint.parents[1]
    partial = tiny_checkpoint.parent / ".tiny.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"")
    assert list(find_models(storage)) == [("org/tiny", tiny_checkpoint)]


def test_a_storage_path_that_is_not_there_has_no_models(tmp_path: Path) -> None:
    assert list(find_models(tmp_path / "no")) == []


def test_links_that_lead_nowhere_and_files_are_passed_over(tiny_checkpoint: Path) -> None:
    storage = tiny_checkpoint.parent.parent
    (storage / "notes.txt").touch()
    (storage / "loop").symlink_to("loop")
    (storage / "nowhere").symlink_to(storage / "gone")
    assert [name for name, _ in find_models(storage)] == ["org/tiny"]
    with pytest.raises(CheckpointNotFound, match="no checkpoint `x`"):
        resolve_model("x", storage)


@pytest.mark.parametrize("name", ["x" * 300, "./" + "x" * 300])
def test_a_name_that_no_file_can_have_is_not_found(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"cannot look at .*File name too long"):
        resolve_model(name, tmp_path)


def test_a_directory_that_may_not_be_searched_says_so(tmp_path: Path) -> None:
    path = tmp_path / "loop"
    path.symlink_to("loop")
    with pytest.raises(CheckpointNotFound, match=r"cannot look at .*\(ELOOP\)"):
        resolve_model(path / "model", tmp_path)

"""Which files of a directory are weights, which go along, and which stay behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sllmctl.core.write.convert import convert
from sllmctl.core.write.sources import list_source
from sllmctl.errors import CheckpointError, CheckpointNotFound
from tests.conftest import some_tensors, write_checkpoint
from tests.convert.conftest import TENSORS, assert_same_tensors, files_of


def fill(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


OTHER_FORMATS = (
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "optimizer.pt"),
    *("consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "m.gguf"),
    *("model.onnx", "onnx/model.onnx", "onnx/config.json", "original/params.json"),
    *("original/consolidated.00.pth", "sub/pytorch_model.bin"),
)


def test_other_weight_formats_stay_behind(source: Path, target: Path) -> None:
    fill(source, *OTHER_FORMATS)
    result = convert(source, target)
    assert not files_of(target).keys() & set(OTHER_FORMATS)
    assert (target / "pooling" / "deep" / "config.json").is_file()
    assert result.warnings == ()


def test_weights_in_folders_go_along(source: Path, target: Path) -> None:
    write_checkpoint(source / "1_Dense", {"model.safetensors": some_tensors(3)})
    convert(source, target)
    dense = (target / "1_Dense" / "model.safetensors").read_bytes()
    assert dense == (source / "1_Dense" / "model.safetensors").read_bytes()
    assert_same_tensors(target, TENSORS)


def test_a_second_copy_of_the_weights_stays_behind_and_is_named(source: Path, target: Path) -> None:
    fill(source, "consolidated.safetensors")
    result = convert(source, target)
    assert result.warnings == (
        "`consolidated.safetensors` is not part of the checkpoint and is not copied",
    )
    assert "consolidated.safetensors" not in files_of(target)


def test_tools_own_files_stay_behind(source: Path, target: Path) -> None:
    fill(source, ".git/config", ".cache/huggingface/x.metadata", "model.lock", "sub/.git/HEAD")
    fill(source, ".gitattributes", "sllmctl.json")
    convert(source, target)
    found = files_of(target)
    assert ".gitattributes" in found
    assert found["sllmctl.json"] != b"sllmctl.json"
    assert not [name for name in found if ".git/" in name or ".cache" in name or "lock" in name]


def test_exclude_leaves_files_out(source: Path, target: Path) -> None:
    convert(source, target, exclude=["*.txt", "pooling/*"])
    assert sorted(files_of(target)) == [
        "config.json",
        "model.safetensors",
        "sllmctl.json",
        "tokenizer.json",
    ]


def test_include_takes_only_what_matches(source: Path, target: Path) -> None:
    convert(source, target, include=["*.safetensors*", "config.json"])
    assert sorted(files_of(target)) == [
        "config.json",
        "model.safetensors",
        "pooling/deep/config.json",
        "sllmctl.json",
    ]


def test_include_brings_in_another_format(source: Path, target: Path) -> None:
    fill(source, "onnx/model.onnx", "pytorch_model.bin")
    convert(source, target, include=["*.safetensors*", "onnx/*"])
    assert sorted(files_of(target)) == ["model.safetensors", "onnx/model.onnx", "sllmctl.json"]


def test_excluding_a_shard_that_the_index_names_is_an_error(source: Path, target: Path) -> None:
    with pytest.raises(CheckpointError, match="names `model-00002.*which is not there"):
        convert(source, target, exclude=["model-00002*"])


def test_only_listed_files_take_part(source: Path, target: Path) -> None:
    names = [
        "config.json",
        "model.safetensors.index.json",
        *(p.name for p in source.glob("*-of-*")),
    ]
    convert(source, target, files=names)
    assert sorted(files_of(target)) == ["config.json", "model.safetensors", "sllmctl.json"]


@pytest.fixture
def snapshot(source: Path, tmp_path: Path) -> Path:
    """The source as Hugging Face's cache has it: links from snapshots/ into blobs/."""
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    commit = repository / "snapshots" / ("0" * 40)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        blob = repository / "blobs" / f"{number:040}"
        path.rename(blob)
        link = commit / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return commit


def test_links_of_a_hub_cache_become_files(snapshot: Path, target: Path) -> None:
    result = convert(snapshot, target)
    assert result.warnings == ()
    assert_same_tensors(target, TENSORS)
    found = files_of(target)
    assert found["tokenizer.json"] == (snapshot / "tokenizer.json").read_bytes()
    assert "pooling/deep/config.json" in found
    assert not [path for path in target.rglob("*") if path.is_symlink()]


def test_a_link_out_of_the_source_is_not_followed(
    source: Path, target: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (source / "notes.txt").symlink_to(secret)
    (source / "pooling" / "up.txt").symlink_to("../../secret")
    (source / "folder").symlink_to(tmp_path)
    (source / "gone.txt").symlink_to("nowhere")
    (source / "inside.txt").symlink_to("config.json")
    os.mkfifo(source / "pipe")
    result = convert(source, target)
    found = files_of(target)
    assert b"secret" not in found.values()
    assert found["inside.txt"] == found["config.json"]
    assert sorted(result.warnings) == [
        "`folder` is a link to a directory and is not copied",
        "`gone.txt` is a broken link and is not copied",
        "`notes.txt` links out of the source and is not copied",
        "`pipe` is not a regular file and is not copied",
        "`pooling/up.txt` links out of the source and is not copied",
    ]


def test_shards_may_be_links_to_anywhere(source: Path, target: Path, tmp_path: Path) -> None:
    for path in source.glob("*.safetensors"):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    convert(source, target)
    assert_same_tensors(target, TENSORS)


def test_torch_files_are_found_by_the_usual_names(tmp_path: Path) -> None:
    def weights(*names: str) -> list[str]:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        fill(directory, *names)
        listing = list_source(directory)
        assert listing.kind == "torch"
        return [file.name for file in listing.weights]

    assert weights("pytorch_model.bin", "training_args.bin", "x.pt") == ["pytorch_model.bin"]
    assert weights("pytorch_model-2.bin", "pytorch_model-10.bin", "other.bin") == [
        "pytorch_model-2.bin",
        "pytorch_model-10.bin",
    ]
    assert weights("b.pth", "a.pt", "optimizer.pt", "rng_state_0.pth", "scheduler.pt") == [
        "a.pt",
        "b.pth",
    ]
    with pytest.raises(CheckpointNotFound, match="no weights"):
        weights("training_args.bin", "README.md")


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_weights_that_cannot_be_read_are_not_passed_over(
    source: Path, target: Path, what: str
) -> None:
    fill(source, "pytorch_model.bin")
    name = next(source.glob("*.safetensors")).name
    (source / name).unlink()
    if what == "link":
        (source / name).symlink_to(source / "gone")
    else:
        os.mkfifo(source / name)
    with pytest.raises(CheckpointError, match=rf"{name}` (is a broken link|is not a regular file)"):
        convert(source, target)
    assert not target.exists()


def test_a_part_of_what_the_names_count_is_refused(tmp_path: Path, target: Path) -> None:
    fill(tmp_path / "some", "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"`pytorch_model-00002-of-00002\.bin` is missing"):
        convert(tmp_path / "some", target)
    part = "model-00001-of-00002.safetensors"
    write_checkpoint(tmp_path / "part", {part: some_tensors(3)})
    with pytest.raises(CheckpointError, match="`model-00002-of-00002.safetensors` is missing"):
        convert(tmp_path / "part", target)
    convert(tmp_path / "part" / part, target)
    assert_same_tensors(target, some_tensors(3))


def test_a_folder_that_cannot_be_read_is_named(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source, "tokenizer/vocab.txt")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path) == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused = str(source / "tokenizer")
    warnings = convert(source, target).warnings
    assert warnings == (
        "`tokenizer` cannot be read (Permission denied (EACCES)) and is not copied",
    )
    refused = str(source)
    with pytest.raises(CheckpointError, match=r"cannot read .*\(EACCES\)"):
        list_source(source)


def test_patterns_that_leave_no_weights_are_named(source: Path) -> None:
    with pytest.raises(CheckpointNotFound) as caught:
        list_source(source, include=["*.txt"])
    assert caught.value.hint == "--include and --exclude may leave them out"

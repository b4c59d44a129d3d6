"""Converting `.bin`, `.pt` and `.pth`: every element, bounded memory, and no code run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.fileio import SourceFile
from sllmctl.core.write.convert import convert
from sllmctl.core.write.sources import list_source
from sllmctl.core.write.tensor_bytes import TensorBytes
from sllmctl.core.write.torch_files import open_torch_files
from sllmctl.errors import CheckpointError
from tests.convert.conftest import TENSORS, assert_same_tensors, files_of

BASE = torch.arange(3000.0).reshape(50, 60)
VIEWS = {
    "base": BASE,
    "rows": BASE[10:20],
    "offset": BASE.reshape(-1)[7:],
    "columns": BASE[:, 3:9],
    "transposed": BASE.t(),
    "steps": BASE[::3, ::2],
    "expanded": BASE[0].expand(4, 60),
    "scalar": BASE[3, 4],
    "empty": BASE[:0],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_every_dtype_and_shape(source: Path, target: Path, name: str) -> None:
    torch.save(TENSORS, source / name)
    convert(source, target)
    assert_same_tensors(target, TENSORS)
    assert sorted(files_of(target)) == ["config.json", "model.safetensors", "sllmctl.json"]


def test_views_are_stored_as_what_they_show(source: Path, target: Path) -> None:
    torch.save(VIEWS, source / "pytorch_model.bin")
    convert(source, target)
    assert_same_tensors(target, VIEWS)
    assert open_checkpoint(target).aliases == {}


def test_tied_tensors_are_stored_once(source: Path, target: Path) -> None:
    tied = {"embed": BASE, "lm_head": BASE, "again": BASE.view(50, 60), "other": BASE.clone()}
    torch.save(tied, source / "pytorch_model.bin")
    result = convert(source, target)
    assert_same_tensors(target, tied)
    assert open_checkpoint(target).aliases == {"lm_head": "embed", "again": "embed"}
    assert result.bytes == 2 * BASE.nbytes


def test_lazy_conjugates_are_stored_as_values(source: Path, target: Path) -> None:
    numbers = torch.randn(9, dtype=torch.complex64)
    tensors = {"plain": numbers, "conj": numbers.conj()}
    torch.save(tensors, source / "pytorch_model.bin")
    convert(source, target)
    expected = {name: tensor.resolve_conj() for name, tensor in tensors.items()}
    assert_same_tensors(target, expected)


def test_tensors_are_read_from_their_place_in_the_file(source: Path) -> None:
    torch.save({"a": BASE, "b": BASE[5:], "t": BASE.t()}, source / "pytorch_model.bin")
    weights = open_torch_files(list_source(source))
    kinds = {name: type(place[0]) for name, place in weights.sources.items()}
    weights.close()
    assert kinds == {"a": SourceFile, "b": SourceFile, "t": TensorBytes}


def test_files_of_the_old_format_are_read(source: Path, target: Path) -> None:
    tensors = {"a": BASE, "tied": BASE, "half": BASE.half(), "view": BASE[3:5]}
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(source, target)
    assert_same_tensors(target, tensors)


def test_several_files_with_an_index(source: Path, target: Path) -> None:
    weight_map = {}
    for number, name in enumerate(sorted(TENSORS)):
        weight_map[name] = f"pytorch_model-{number % 3 + 1:05}-of-00003.bin"
    for file in set(weight_map.values()):
        part = {name: TENSORS[name] for name, place in weight_map.items() if place == file}
        torch.save(part, source / file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (source / "pytorch_model.bin.index.json").write_text(index)
    convert(source, target)
    assert_same_tensors(target, TENSORS)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match="names `pytorch_model-00002.*not there"):
        convert(source, target, force=True)


def test_one_name_in_two_files_is_refused(source: Path, target: Path) -> None:
    torch.save({"a": BASE}, source / "pytorch_model-1.bin")
    torch.save({"a": BASE}, source / "pytorch_model-2.bin")
    with pytest.raises(CheckpointError, match="`a` is in two files .*-1.bin` and `py"):
        convert(source, target)


def test_the_state_dict_of_a_training_checkpoint_is_taken(source: Path, target: Path) -> None:
    torch.save({"state_dict": TENSORS, "epoch": 3, "lr": [0.1]}, source / "model.pt")
    convert(source, target)
    assert_same_tensors(target, TENSORS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": BASE, "epoch": 3}, "`epoch` is of type int, not a tensor"),
        ({"model": {"a": BASE}}, "`model` is of type dict, not a tensor"),
        ({1: BASE}, "the name `1` is not text"),
        ([BASE], "holds a list, not tensors by name"),
        (BASE, "holds a Tensor, not tensors by name"),
        ({"a": BASE.to_sparse()}, "tensor `a` is sparse, quantized or nested"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "no type for torch.complex128"),
    ],
)
def test_anything_but_tensors_by_name_is_refused(
    source: Path, target: Path, content: object, message: str
) -> None:
    torch.save(content, source / "model.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, target)
    assert str(source / "model.pt") in str(caught.value)
    assert not target.parent.exists()


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(
    source: Path, target: Path, tmp_path: Path, zipped: bool
) -> None:
    mark = tmp_path / "mark"
    torch.save(
        {"a": BASE, "evil": Evil(mark)},
        source / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match="reading it would run code of its own"):
        convert(source, target)
    assert not mark.exists()


def test_damaged_files_are_named(source: Path, target: Path) -> None:
    path = source / "pytorch_model.bin"
    torch.save({"a": BASE}, path)
    whole = path.read_bytes()
    for content in (b"", b"junk" * 100, whole[: len(whole) // 2], pickle.dumps({"a": 1}) + b"x"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"`{path}`") as caught:
            convert(source, target)
        assert "\n" not in str(caught.value)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    with pytest.raises(CheckpointError, match="is a pointer to a file, not the file"):
        convert(source, target)


def test_a_big_endian_file_is_refused(source: Path, target: Path) -> None:
    path = source / "pytorch_model.bin"
    torch.save({"a": BASE}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, record in records.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else record)
    with pytest.raises(CheckpointError, match="saved on a big-endian machine"):
        convert(source, target)

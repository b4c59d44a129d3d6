"""Every damaged byte is found and named."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from sllmctl.core import fileio
from sllmctl.core.verify import verify
from sllmctl.core.write.convert import convert
from sllmctl.errors import CheckpointNotFound
from tests.conftest import write_checkpoint
from tests.convert.conftest import TENSORS
from tests.torture.flip_bits import flip_bits


@pytest.fixture
def converted(source: Path, target: Path) -> Path:
    convert(source, target, max_shard_bytes=10_000)
    return target


def kinds(path: Path) -> list[tuple[str, str]]:
    return [(problem.kind, problem.file) for problem in verify(path).problems]


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 16
    path.write_bytes(content)


def test_a_whole_checkpoint_is_ok(converted: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = verify(converted, progress=lambda *call: calls.append(call))
    assert report.ok
    assert (report.checked, report.problems, report.warnings) == ("digests", (), ())
    assert report.tensors == len(TENSORS)
    manifest = (converted / "sllmctl.json").stat().st_size
    everything = sum(path.stat().st_size for path in converted.rglob("*") if path.is_file())
    assert report.bytes == everything - manifest
    assert calls
    assert calls[-1][1] == calls[-1][2]


def test_fifty_flipped_bits_are_found(converted: Path) -> None:
    assert flip_bits(converted, count=50, seed=1) == []


def test_a_damaged_chunk_names_its_first_tensor_and_its_place(tmp_path: Path, target: Path) -> None:
    tensors = {f"layers.{n}.w": torch.randn(3 * 2**20) for n in range(4)}
    convert(write_checkpoint(tmp_path / "s", {"model.safetensors": tensors}), target)
    flip(target / "model.safetensors", 40 * 2**20)
    (problem,) = verify(target).problems
    assert (problem.kind, problem.file) == ("digest", "model.safetensors")
    assert problem.offset == 32 * 2**20
    assert problem.tensor == "layers.2.w"
    assert problem.message == (
        "`model.safetensors` is damaged between bytes 33554432 and 50331648, "
        "in `layers.2.w` or 1 more"
    )


def test_every_damaged_chunk_is_listed(tmp_path: Path, target: Path) -> None:
    tensors = {"w": torch.randn(16 * 2**20)}
    convert(write_checkpoint(tmp_path / "s", {"model.safetensors": tensors}), target)
    for offset in (5000, 2 * 2**24 + 1, 4 * 2**24 + 4095):
        flip(target / "model.safetensors", offset)
    assert [problem.offset for problem in verify(target).problems] == [0, 2 * 2**24, 4 * 2**24]


def test_a_damaged_header_is_found_even_in_its_padding(converted: Path) -> None:
    path = min(converted.glob("*.safetensors"))
    flip(path, 4000)
    assert ("digest", path.name) in kinds(converted)
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    found = {p.kind: p for p in verify(converted).problems}
    assert found["structure"].offset == 0
    assert "announces a header of 18446744073709551615 bytes" in found["structure"].message
    assert found["digest"].tensor is None


def test_a_missing_shard_is_found(converted: Path) -> None:
    path = max(converted.glob("*.safetensors"))
    path.unlink()
    assert kinds(converted) == [("missing", path.name)]


@pytest.mark.parametrize("pattern", ["model-00001-of-*", "config.json"])
def test_a_pipe_in_the_place_of_a_file_is_found(converted: Path, pattern: str) -> None:
    name = next(converted.glob(pattern)).name
    (converted / name).unlink()
    os.mkfifo(converted / name)
    problems = verify(converted).problems
    assert [(p.kind, p.file) for p in problems] == [("read", name)]
    assert problems[0].message.endswith("is not a regular file")


def test_a_truncated_shard_is_found(converted: Path) -> None:
    path = max(converted.glob("*.safetensors"))
    size = path.stat().st_size
    os.truncate(path, size - 10)
    problems = verify(converted).problems
    assert {problem.kind for problem in problems} == {"size", "structure", "digest"}
    sizes = next(problem for problem in problems if problem.kind == "size")
    assert sizes.message == f"`{path.name}` is {size - 10} bytes long; {size} were written"


def test_a_longer_shard_is_found(converted: Path) -> None:
    path = max(converted.glob("*.safetensors"))
    with path.open("ab") as file:
        file.write(b"x")
    assert {kind for kind, _ in kinds(converted)} == {"size", "structure"}


def test_an_extra_shard_is_found(converted: Path) -> None:
    shutil.copy(max(converted.glob("*.safetensors")), converted / "extra.safetensors")
    assert kinds(converted) == [("extra", "extra.safetensors")]


def test_swapped_shards_are_found(converted: Path) -> None:
    one, other, *_ = sorted(converted.glob("*.safetensors"))
    one.rename(converted / "x")
    other.rename(one)
    (converted / "x").rename(other)
    assert {file for _, file in kinds(converted)} == {one.name, other.name}


def test_a_bad_manifest_is_a_problem_and_the_structure_is_still_checked(converted: Path) -> None:
    manifest = converted / "sllmctl.json"
    manifest.write_text(manifest.read_text().replace('"keep"', '"kept"'))
    report = verify(converted)
    assert [p.kind for p in report.problems] == ["manifest"]
    assert report.checked == "structure"
    assert report.tensors == len(TENSORS)
    max(converted.glob("*.safetensors")).unlink()
    assert [p.kind for p in verify(converted).problems] == ["structure", "manifest"]


def test_a_manifest_alone_is_no_checkpoint_but_a_problem(converted: Path) -> None:
    for path in converted.glob("*.safetensors*"):
        path.unlink()
    assert {kind for kind, _ in kinds(converted)} == {"missing"}
    (converted / "sllmctl.json").write_text("{}")
    assert {kind for kind, _ in kinds(converted)} == {"missing", "manifest"}


def test_a_damaged_index_is_a_problem(converted: Path) -> None:
    flip(converted / "model.safetensors.index.json", 100)
    assert ("digest", "model.safetensors.index.json") in kinds(converted)
    (converted / "model.safetensors.index.json").unlink()
    assert kinds(converted) == [("missing", "model.safetensors.index.json")]


def test_changed_files_beside_the_weights_are_warnings(converted: Path) -> None:
    (converted / "config.json").write_text("{}")
    flip(converted / "tokenizer.json", 7)
    report = verify(converted)
    assert report.ok
    assert [(w.kind, w.file) for w in report.warnings] == [
        ("changed", "config.json"),
        ("changed", "tokenizer.json"),
    ]
    assert report.warnings[0].message == "`config.json` has changed since the conversion"


def test_a_missing_file_beside_the_weights_is_a_problem(converted: Path) -> None:
    (converted / "tokenizer.json").unlink()
    assert kinds(converted) == [("missing", "tokenizer.json")]


def test_an_unconverted_checkpoint_has_its_structure_checked(source: Path) -> None:
    report = verify(source)
    assert report.ok
    assert (report.checked, report.bytes, report.tensors) == ("structure", 0, len(TENSORS))
    path = max(source.glob("*.safetensors"))
    assert verify(path).ok
    os.truncate(path, 3000)
    (problem,) = verify(source).problems
    assert problem.kind == "structure"
    assert "is it truncated" in problem.message


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointNotFound):
            verify(path)


def test_a_disk_that_fails_is_a_problem_of_that_chunk(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = max(converted.glob("*.safetensors"))
    preadv = os.preadv

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink() == path and threading_name().startswith("sllm"):
            raise OSError(5, "Input/output error")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(fileio.os, "preadv", fail)
    problems = verify(converted).problems
    assert [(p.kind, p.file, p.offset) for p in problems] == [("read", path.name, 0)]
    assert problems[0].message == f"cannot read `{path}` at byte 0: Input/output error (EIO)"


def threading_name() -> str:
    import threading

    return threading.current_thread().name


def test_random_places_of_the_index_and_manifest(converted: Path) -> None:
    generator = random.Random(3)
    for name in ("model.safetensors.index.json", "sllmctl.json"):
        path = converted / name
        whole = path.read_bytes()
        for _ in range(40):
            flip(path, generator.randrange(len(whole)))
            assert not verify(converted).ok
            path.write_bytes(whole)

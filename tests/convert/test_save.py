"""Saving tensors that are in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.verify import verify
from sllmctl.core.write import tensor_bytes
from sllmctl.core.write.save import save_tensors
from sllmctl.errors import CheckpointError, ConfigError
from tests.conftest import same_bits, some_tensors
from tests.convert.conftest import assert_same_tensors, files_of, only_child
from tests.convert.test_torch_files import BASE, VIEWS


def test_every_dtype_and_shape(target: Path) -> None:
    tensors = some_tensors(0) | {
        "e8m0": torch.arange(5, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "fp4": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 3),
        "complex": torch.randn(3, dtype=torch.complex64),
        "uint16": torch.tensor([0, 1, 65535], dtype=torch.uint16),
        "uint64": torch.tensor([0, 2**63], dtype=torch.uint64),
    }
    result = save_tensors(tensors, target)
    assert_same_tensors(target, tensors)
    assert open_checkpoint(target).tensors["fp4"].shape == (2, 6)
    assert (result.source, result.path) == ("memory", target)
    assert verify(target).ok


def test_views_are_stored_as_what_they_show(target: Path) -> None:
    numbers = torch.randn(9, dtype=torch.complex64)
    lazy = {"conj": numbers.conj(), "negative": numbers.conj().imag}
    save_tensors(VIEWS | lazy, target)
    assert_same_tensors(
        target,
        VIEWS | {"conj": numbers.conj().resolve_conj(), "negative": lazy["negative"].resolve_neg()},
    )


@pytest.mark.parametrize("chunk_bytes", [64, 256, 4096])
def test_large_strided_tensors_are_copied_in_pieces(
    target: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_bytes, "_STRIDED_BYTES", chunk_bytes)
    cube = torch.arange(2 * 3 * 5 * 7 * 11).reshape(2, 3, 5, 7, 11)
    tensors = {"p": cube.permute(4, 0, 3, 1, 2), "q": cube.permute(1, 0, 2, 4, 3)}
    tensors |= {"flipped": cube.transpose(0, 4)[3:7], "gaps": cube[:, ::2, 1::3], "whole": cube}
    save_tensors(tensors, target)
    assert_same_tensors(target, tensors)


def test_exact_ties_are_stored_once_and_overlaps_by_themselves(target: Path) -> None:
    parameter = torch.nn.Parameter(BASE)
    tensors = {"a": parameter, "tied": parameter.data, "part": BASE[1:], "reshaped": BASE.view(-1)}
    save_tensors(tensors, target)
    assert open_checkpoint(target).aliases == {"tied": "a"}
    assert_same_tensors(target, {name: tensor.detach() for name, tensor in tensors.items()})


def test_empty_tensors_are_never_tied(target: Path) -> None:
    save_tensors({"a": torch.empty(0), "b": torch.empty(0)}, target)
    assert open_checkpoint(target).aliases == {}


def test_a_name_that_metadata_need_is_stored_by_itself(target: Path) -> None:
    save_tensors({"a": BASE, "format": BASE}, target)
    assert open_checkpoint(target).tensors.keys() == {"a", "format"}


def test_files_go_along(target: Path) -> None:
    save_tensors({"a": BASE}, target, files={"config.json": b"{}", "tokenizer/vocab.txt": b"x\n"})
    found = files_of(target)
    assert found["config.json"] == b"{}"
    assert found["tokenizer/vocab.txt"] == b"x\n"
    assert verify(target).warnings == ()


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/x", "../x", "a/../../x", "", "a\0b", "a\udcff"),
        *("sllmctl.json", "model.safetensors", ".sllmctl-state"),
    ],
)
def test_files_stay_inside_and_out_of_the_way(target: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="leads out|itself uses|is not valid Unicode"):
        save_tensors({"a": BASE}, target, files={name: b""})
    assert not target.parent.exists()


def test_a_save_replaces_what_is_there_in_one_step(target: Path) -> None:
    save_tensors({"a": BASE}, target, files={"old.txt": b""})
    save_tensors({"b": BASE}, target, max_shard_bytes=5000)
    assert_same_tensors(target, {"b": BASE})
    assert "old.txt" not in files_of(target)
    assert only_child(target.parent) == target
    with pytest.raises(ConfigError, match="is there already"):
        save_tensors({"a": BASE}, target, force=False)


def test_a_save_that_fails_leaves_the_old_checkpoint(target: Path) -> None:
    save_tensors({"a": BASE}, target)
    before = files_of(target)
    bad: list[dict[str, object]] = [
        {"a": BASE, "b": BASE.to("meta")},
        {"a": BASE, "b": [1]},
        {"a": BASE, "__metadata__": BASE + 1},
        {"a": BASE, "\ud800": BASE + 1},
        {"a": BASE, "s": BASE.to_sparse()},
    ]
    for tensors in bad:
        with pytest.raises(CheckpointError):
            save_tensors(tensors, target)  # type: ignore[arg-type]
        assert files_of(target) == before
        assert only_child(target.parent) == target


def test_several_shards_have_an_index(target: Path) -> None:
    tensors = {f"layers.{n}.w": torch.full((2000,), float(n)) for n in range(12)}
    result = save_tensors(tensors, target, max_shard_bytes=30_000, verify=True)
    assert result.shards == 4
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == list(tensors)
    assert_same_tensors(target, tensors)


def test_saving_copies_no_whole_tensor(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    contiguous = torch.Tensor.contiguous

    def note(self: torch.Tensor) -> torch.Tensor:
        sizes.append(self.nbytes)
        return contiguous(self)

    monkeypatch.setattr(torch.Tensor, "contiguous", note)
    tensor = torch.randn(3000, 7000).t()
    save_tensors({"a": tensor}, target)
    assert max(sizes) <= 16 * 2**20 < tensor.nbytes
    monkeypatch.undo()
    assert same_bits(_load(target)["a"], tensor.contiguous())


def _load(target: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(target / "model.safetensors")

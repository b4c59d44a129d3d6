"""Sources to convert, and what a directory holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sllmctl.core.checkpoint import open_checkpoint
from tests.conftest import same_bits, some_tensors, write_checkpoint


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative name."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_same_tensors(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    """Check that safetensors itself reads these tensors, bit by bit."""
    from safetensors import safe_open

    checkpoint = open_checkpoint(directory)
    assert checkpoint.tensors.keys() | checkpoint.aliases.keys() == expected.keys()
    found = {}
    for shard in checkpoint.shards:
        with safe_open(shard.path, "pt") as reader:
            assert reader.metadata()["format"] == "pt"
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    for name, tensor in expected.items():
        assert same_bits(found[checkpoint.aliases.get(name, name)], tensor.contiguous()), name


def only_child(directory: Path) -> Path:
    """The one thing in a directory: nothing temporary lies beside it."""
    (child,) = directory.iterdir()
    return child


TENSORS = {**some_tensors(0), **some_tensors(1)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model directory as a hub has it: two shards, configuration, tokenizer, a folder."""
    directory = write_checkpoint(
        tmp_path / "source",
        {
            "model-00001-of-00002.safetensors": some_tensors(0),
            "model-00002-of-00002.safetensors": some_tensors(1),
        },
    )
    (directory / "config.json").write_text(json.dumps({"architectures": ["X"], "hidden_size": 4}))
    (directory / "tokenizer.json").write_bytes(bytes(range(256)) * 40)
    (directory / "empty.txt").touch()
    (directory / "pooling" / "deep").mkdir(parents=True)
    (directory / "pooling" / "deep" / "config.json").write_text("{}")
    return directory


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where to convert to: two directories that are not there yet."""
    return tmp_path / "storage" / "org" / "model"

"""Checkpoints of every format version are read for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.verify import verify
from tests.conftest import same_bits
from tests.data.make_golden import golden_tensors

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("version", [1])
def test_a_golden_checkpoint_reads_as_it_was_written(version: int) -> None:
    directory = DATA / f"checkpoint_v{version}"
    report = verify(directory)
    assert report.ok
    assert report.checked == "digests"
    assert report.warnings == ()
    checkpoint = open_checkpoint(directory)
    assert checkpoint.manifest is not None
    found: dict[str, torch.Tensor] = {}
    for shard in checkpoint.shards:
        with safe_open(shard.path, "pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    found |= {alias: found[kept] for alias, kept in checkpoint.aliases.items()}
    expected = golden_tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_every_golden_checkpoint_is_tested() -> None:
    assert [path.name for path in DATA.glob("checkpoint_v*")] == ["checkpoint_v1"]

"""A checkpoint that sllm-store wrote, kept warm like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sllmctl import api
from tests.conftest import same_bits, some_tensors
from tests.sllm_store import golden_tensors, write_sllm_store
from tests.store.conftest import MIB, RunningStore


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    big = torch.randint(-9, 9, (5 * MIB // 2048, 2048), dtype=torch.int8, generator=generator)
    return some_tensors(0) | golden_tensors() | {"big": big, "turned": big.t()}


@pytest.mark.parametrize("by", ["name", "path"])
def test_it_is_filled_once_and_then_warm(
    store: RunningStore, tensors: dict[str, torch.Tensor], by: str
) -> None:
    path = write_sllm_store(store.storage / "org" / "old", tensors, partition_bytes=4 * MIB)
    model: Path | str = path if by == "path" else "org/old"
    for warm in (False, True):
        loaded = api.load(model, store="require", socket=store.socket, storage_path=store.storage)
        assert loaded.tensors.keys() == tensors.keys()
        assert not [name for name in tensors if not same_bits(loaded.tensors[name], tensors[name])]
        assert loaded.tensors["head"] is loaded.tensors["embed"]
        stats = loaded.stats
        read = stats.disk_bytes + stats.page_cache_bytes
        assert (stats.store_bytes, read) == ((stats.bytes, 0) if warm else (0, stats.bytes))

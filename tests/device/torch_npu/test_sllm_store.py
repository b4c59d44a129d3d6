"""What sllm-store wrote, on a device: strides and ties kept, padding left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sllmctl import api, convert
from sllmctl.core.load import LoadOptions
from sllmctl.errors import ChecksumMismatch
from tests.conftest import same_bits
from tests.sllm_store import golden_tensors, write_sllm_store


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return write_sllm_store(tmp_path / "saved", golden_tensors(), partition_bytes=1000)


def test_every_stride_and_tie_comes_to_the_device(saved: Path) -> None:
    loaded = api.load(saved, "npu:0", store="off")
    want = golden_tensors()
    turned = loaded.tensors.pop("transposed")
    assert turned.stride() == want["transposed"].stride()
    # No operator that gathers runs here: its memory, as it lies, comes back in one copy.
    want["transposed"] = want["transposed"].t()
    loaded.tensors["transposed"] = turned.t()
    assert {str(tensor.device) for tensor in loaded.tensors.values()} == {"npu:0"}
    assert not [name for name in want if not same_bits(loaded.tensors[name].cpu(), want[name])]
    assert loaded.tensors["head"] is loaded.tensors["embed"]
    stats = loaded.stats
    assert stats.disk_bytes + stats.page_cache_bytes == stats.bytes


def test_digests_are_compared_over_the_padding_between_tensors(saved: Path, tmp_path: Path) -> None:
    written = convert(saved, tmp_path / "out", format="sllm-store")
    verify = LoadOptions(verify=True)
    loaded = api.load(written, "npu:0", store="off", options=verify)
    assert loaded.stats.verified
    want = golden_tensors()
    assert not [name for name in want if not same_bits(loaded.tensors[name].cpu(), want[name])]
    data = written / "tensor.data_0"
    content = bytearray(data.read_bytes())
    content[content.index(bytes(torch.arange(9).to(torch.uint8)))] ^= 1
    data.write_bytes(content)
    with pytest.raises(ChecksumMismatch):
        api.load(written, "npu:0", store="off", options=verify)

"""A failing call of the runtime: one line with its code, nothing left, and the next load works."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from sllmctl import api
from sllmctl.core.load import LoadOptions
from sllmctl.core.rings import release_staging
from sllmctl.errors import NativeError
from tests.device.torch_npu.conftest import Emulator

OPTIONS = LoadOptions(chunk_bytes=65536, threads=2)
RULES = (
    "aclrtMallocHost:1:207001",
    "aclrtMallocHost:3:207001",
    "aclrtSetDevice:1:207005",
    "aclrtCreateStream:1:207008",
    "aclrtCreateEventExWithFlag:1:207005",
    "aclrtMemcpyAsync:1:207000",
    "aclrtMemcpyAsync:5:107017",
    "aclrtRecordEvent:2:207007",
    "aclrtQueryEventStatus:1:107017",
    "async:aclrtMemcpyAsync:3:107020",
)
"""Of errors that are not for good: after those, a process must leave the device alone."""


@pytest.mark.parametrize("rule", RULES)
def test_a_failing_call_is_one_clear_error(checkpoint: Path, emulator: Emulator, rule: str) -> None:
    def held() -> list[int]:
        release_staging()
        gc.collect()
        torch.npu.empty_cache()
        return [emulator.count(n) for n in ("used0", "used1", "pinned_bytes", "streams", "events")]

    api.load(checkpoint, "npu:1", options=OPTIONS, store="off")
    before = held()
    emulator.fail(rule)
    with pytest.raises(NativeError) as caught:
        api.load(checkpoint, "npu:1", options=OPTIONS, store="off")
    assert emulator.failed()
    emulator.fail(None)
    message = str(caught.value)
    assert rule.rpartition(":")[2] in message and "\n" not in message
    del caught
    assert held() == before
    assert api.load(checkpoint, "npu:1", options=OPTIONS, store="off").tensors

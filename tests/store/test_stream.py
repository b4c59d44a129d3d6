"""Streams into host memory, through the store as far as it has or gets the bytes."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from sllmctl import load_tensors, stream_tensors
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.load import open_shard
from sllmctl.errors import StoreUnreachable
from sllmctl.store.client import StoreClient
from sllmctl.store.protocol import close_fds
from sllmctl.store.spans import StoreSpans
from tests.conftest import same_bits
from tests.store.conftest import MIB, RunningStore
from tests.store.test_named import bytes_of, warm
from tests.store.test_store import anonymous_bytes

MakeModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _use(monkeypatch: pytest.MonkeyPatch, store: RunningStore) -> None:
    monkeypatch.setenv("SLLMCTL_SOCKET", str(store.socket))
    monkeypatch.setenv("SLLMCTL_STORAGE_PATH", str(store.storage))


def check(stream: Iterator[tuple[str, torch.Tensor]], want: dict[str, torch.Tensor]) -> None:
    names = []
    for name, tensor in stream:
        assert same_bits(tensor, want[name]), name
        names.append(name)
    assert sorted(names) == sorted(want)


def test_a_stream_fills_the_store_and_the_next_one_reads_nothing(
    store: RunningStore, make_model: MakeModel
) -> None:
    want = load_tensors(make_model("m", mib=30), store="off")
    check(stream_tensors("m", store="require"), want)
    before = store.status()["counters"]
    check(stream_tensors("m", store="require"), want)
    after = store.status()["counters"]
    assert after["bytes_warm"] - before["bytes_warm"] >= 30 * MIB
    assert after["bytes_disk"] + after["bytes_cache"] == (
        before["bytes_disk"] + before["bytes_cache"]
    )
    store.wait_for(lambda status: not status["leases"])


def test_a_model_larger_than_the_pool_streams_from_both(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("large", mib=150)
    for _ in range(2):
        check(stream_tensors("large", store="require"), load_tensors(path, store="off"))


def test_what_is_warm_takes_no_memory_of_the_consumers(
    store: RunningStore, make_model: MakeModel
) -> None:
    make_model("m", mib=40)
    warm(store, "m")
    gc.collect()
    before = anonymous_bytes()
    kept = [tensor for _, tensor in stream_tensors("m", store="require")]
    assert all(int(tensor.view(torch.uint8).sum()) >= 0 for tensor in kept if tensor.dim())
    assert anonymous_bytes() - before < 10 * MIB
    assert len(store.status()["leases"]) == 1


def test_a_stream_goes_on_when_the_store_dies(store: RunningStore, make_model: MakeModel) -> None:
    want = load_tensors(make_model("m", mib=150), store="off")
    stream = stream_tensors("m", store="require")
    name, first = next(stream)
    store.end(signal.SIGKILL)
    assert same_bits(first, want.pop(name))
    check(stream, want)


def test_a_stream_without_a_store_comes_from_disk(
    store: RunningStore, make_model: MakeModel
) -> None:
    want = load_tensors(make_model("m"), store="off")
    store.end(signal.SIGKILL)
    check(stream_tensors("m"), want)
    with pytest.raises(StoreUnreachable):
        stream_tensors("m", store="require")


def test_a_model_whose_files_are_gone_streams_from_its_name(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m")
    want = bytes_of(path)
    warm(store, "m")
    shutil.rmtree(path)
    check(stream_tensors("m"), want)


def receive_all(client: StoreClient) -> None:
    while True:
        close_fds(client.receive()[1])


def test_a_wait_that_another_thread_ends_closes_its_descriptors_itself(
    store: RunningStore, make_model: MakeModel
) -> None:
    checkpoint = open_checkpoint(make_model("m"))
    with ExitStack() as stack:
        fds = [open_shard(shard, stack) for shard in checkpoint.shards]
        client = StoreClient(store.socket)
        spans = StoreSpans(client, checkpoint, fds, "m")
        stack.callback(spans.close)
        before = os.listdir("/proc/self/fd")
        spans.interrupt()
        assert os.listdir("/proc/self/fd") == before
        with pytest.raises(StoreUnreachable):
            receive_all(client)
        assert len(os.listdir("/proc/self/fd")) == len(before) - 1
        spans.interrupt()

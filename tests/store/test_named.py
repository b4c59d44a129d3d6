"""Models by name: with files that only the store sees, and with none at all."""

from __future__ import annotations

import gc
import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sllmctl import api, load_tensors
from sllmctl.core.device_load import DeviceLoad
from sllmctl.core.load import Loaded, LoadOptions
from sllmctl.core.placement import DeviceMap
from sllmctl.errors import CheckpointError, CheckpointNotFound, ConfigError, StoreError
from sllmctl.store.client import StoreClient
from sllmctl.store.files import open_named, take_files
from sllmctl.store.load import load_named, load_named_to_devices
from sllmctl.store.named import NamedModel
from tests.conftest import same_bits
from tests.store.conftest import MIB, RunningStore

MakeModel = Callable[..., Path]


def warm(store: RunningStore, name: str) -> None:
    with StoreClient(store.socket) as client:
        client.ask({"op": "warm", "name": name})
        while client.receive()[0]["event"] != "settled":
            pass


def load(store: RunningStore, name: str, options: LoadOptions | None = None) -> Loaded:
    """Load as a process does that sees no file of the store's."""
    nowhere = store.storage.parent / "nowhere"
    return api.load(
        name, store="require", socket=store.socket, storage_path=nowhere, options=options
    )


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert not [name for name in want if not same_bits(got[name], want[name])]


def bytes_of(path: Path) -> dict[str, torch.Tensor]:
    """A model's tensors, in memory of their own."""
    return {name: tensor.clone() for name, tensor in load_tensors(path, store="off").items()}


def test_a_model_whose_files_are_gone_loads_from_warm_segments(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("org/model")
    want = bytes_of(path)
    warm(store, "org/model")
    shutil.rmtree(path)
    loaded = load(store, "org/model")
    assert_equal(loaded.tensors, want)
    assert loaded.stats.store_bytes == loaded.stats.bytes == loaded.stats.mapped_bytes
    (lease,) = store.status()["leases"]
    assert lease["model"] == "org/model"
    loaded.tensors.clear()
    gc.collect()
    store.wait_for(lambda status: not status["leases"])


def test_a_model_of_more_parts_than_a_process_may_open_files_loads_all_the_same(
    start_store: Callable[..., RunningStore], make_model: MakeModel
) -> None:
    path = make_model("m", mib=40)
    want = bytes_of(path)
    store = start_store()
    warm(store, "m")
    shutil.rmtree(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, hard))
    try:
        loaded = load(store, "m")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_equal(loaded.tensors, want)
    assert loaded.stats.store_bytes == loaded.stats.bytes
    loaded.tensors.clear()
    gc.collect()


def test_a_model_whose_weights_alone_are_gone_loads_too(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m")
    want = bytes_of(path)
    warm(store, "m")
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    assert (path / "model.safetensors.index.json").exists()
    assert_equal(load(store, "m").tensors, want)


def test_files_that_only_the_store_opens_fill_what_found_no_room(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("large", mib=100)
    for _ in range(2):
        loaded = load(store, "large")
        assert_equal(loaded.tensors, load_tensors(path, store="off"))
        stats = loaded.stats
        assert stats.store_bytes + stats.disk_bytes + stats.page_cache_bytes == stats.bytes
        del loaded
        gc.collect()
    assert stats.store_bytes > 50 * MIB


def test_a_model_that_is_partly_warm_and_gone_is_refused_with_numbers(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("large", mib=100)
    warm(store, "large")
    shutil.rmtree(path)
    with pytest.raises(CheckpointNotFound, match=r"32 of 5\d parts .* its files are gone"):
        load(store, "large")
    store.wait_for(lambda status: not status["leases"])


def test_a_name_that_nobody_knows_is_refused(store: RunningStore, make_model: MakeModel) -> None:
    make_model("m")
    with pytest.raises(CheckpointNotFound, match="`nobody`.* and the store has none"):
        load(store, "nobody")
    for path in (store.storage / "nobody", "../models/m", "/m"):
        with pytest.raises(CheckpointNotFound, match="there is no"):
            api.load(path, store="require", socket=store.socket)


def test_a_load_that_is_refused_once_its_model_is_found_keeps_nothing_of_it(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m")
    warm(store, "m")
    shutil.rmtree(path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="device_map") as caught:
        api.load(
            "m",
            device_map={"no_such_module": "cpu"},
            store="require",
            socket=store.socket,
            storage_path=store.storage.parent / "nowhere",
        )
    assert os.listdir("/proc/self/fd") == before
    assert caught.value.__traceback__ is not None  # what the failure's frames hold counts
    store.wait_for(lambda status: not status["leases"])


def test_a_client_that_brings_the_files_of_a_name_makes_it_known_by_that_name(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("org/model")
    want = bytes_of(path)
    api.load("org/model", store="require", socket=store.socket, storage_path=store.storage)
    gc.collect()
    shutil.rmtree(path)
    assert_equal(load(store, "org/model").tensors, want)


def test_a_label_is_no_name_unless_the_files_are_those_of_the_name(
    store: RunningStore, make_model: MakeModel
) -> None:
    real, other = make_model("real"), make_model("other", seed=5)
    api.load(other, store="require", socket=store.socket, label="real")
    gc.collect()
    shutil.rmtree(real)
    with pytest.raises(CheckpointNotFound, match="the store has none"):
        load(store, "real")


def test_part_of_a_models_files_or_files_beside_it_do_not_take_its_name(
    tmp_path: Path, make_model: MakeModel
) -> None:
    """Such a model would take the name, and end the pin, of the one that has it."""
    storage, path = tmp_path / "models", make_model("m", shards=2)
    shards = sorted(path.glob("*.safetensors"))
    beside = sorted(make_model("beside", shards=2).glob("*.safetensors"))
    names = [shard.name for shard in shards]

    def is_named(names: list[str], paths: list[Path]) -> bool:
        files = take_files(storage, "m", names, [os.open(one, os.O_RDONLY) for one in paths])
        files.close()
        return files.named

    assert is_named(names, shards)
    assert not is_named(names[:1], shards[:1])
    assert not is_named(names[::-1], shards[::-1])
    assert not is_named([f"../beside/{name}" for name in names], beside)
    assert not is_named(names, beside)


def test_a_model_of_more_shards_than_the_store_takes_is_refused(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("m", shards=3)
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr("sllmctl.store.files.MAX_SHARDS", 2)
    with pytest.raises(StoreError, match="`m` has more than 2 shards"):
        open_named(tmp_path / "models", "m")
    assert os.listdir("/proc/self/fd") == before


def test_a_replaced_model_that_is_gone_is_the_newer_one(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m", seed=1)
    warm(store, "m")
    shutil.rmtree(path)
    want = bytes_of(make_model("m", seed=2))
    warm(store, "m")
    shutil.rmtree(path)
    assert_equal(load(store, "m").tensors, want)


@pytest.mark.parametrize("to_device", [False, True])
def test_a_file_that_is_written_to_once_it_is_handed_out_is_refused(
    store: RunningStore, make_model: MakeModel, to_device: bool
) -> None:
    """What is warm is the old file's, and what is read would be the new one's."""
    path = make_model("large", mib=100)
    named, options = NamedModel(StoreClient(store.socket), "large"), LoadOptions()
    os.utime(max(path.glob("*.safetensors")), ns=(1, 1))
    run = partial(load_named, named, options)
    if to_device:
        placement = DeviceMap.parse("cpu").place(named.checkpoint)
        ready = DeviceLoad(named.checkpoint, placement, options)
        run = partial(load_named_to_devices, named, ready, options)
    with pytest.raises(CheckpointError, match="changed while it was loaded"):
        run()
    named.client.close()


def test_digests_that_are_gone_are_not_passed_over(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m")
    warm(store, "m")
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="no digests"):
        load(store, "m", LoadOptions(verify=True))


@pytest.mark.parametrize("gone", [True, False])
def test_a_model_by_its_name_reaches_a_device_through_the_ring(
    store: RunningStore, make_model: MakeModel, gone: bool
) -> None:
    path = make_model("m", mib=30 if gone else 100)
    want = bytes_of(path)
    warm(store, "m")
    if gone:
        shutil.rmtree(path)
    named = NamedModel(StoreClient(store.socket), "m")
    options, placement = LoadOptions(), DeviceMap.parse("cpu").place(named.checkpoint)
    loaded = load_named_to_devices(named, DeviceLoad(named.checkpoint, placement, options), options)
    assert_equal(loaded.tensors, want)
    stats = loaded.stats
    assert stats.store_bytes + stats.disk_bytes + stats.page_cache_bytes == stats.bytes
    assert (stats.store_bytes == stats.bytes) == gone
    store.wait_for(lambda status: not status["leases"])

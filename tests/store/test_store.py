"""A store and its clients, end to end: every byte right, wherever it comes from."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sllmctl import api, load_tensors
from sllmctl.core.load import Loaded, LoadOptions
from sllmctl.errors import StoreUnreachable
from sllmctl.native import probe_file
from sllmctl.store.client import StoreClient
from tests.conftest import same_bits
from tests.store.conftest import MIB, RunningStore

MakeModel = Callable[..., Path]


def load(store: RunningStore, model: Path | str, /, **options: object) -> Loaded:
    arguments = {"store": "require", "socket": store.socket, "storage_path": store.storage}
    return api.load(model, **{**arguments, **options})  # type: ignore[arg-type]


def assert_equal(got: dict[str, torch.Tensor], path: Path) -> None:
    want = load_tensors(path, store="off")
    assert got.keys() == want.keys()
    assert not [name for name in want if not same_bits(got[name], want[name])]


def test_the_first_load_fills_the_pool_and_the_second_is_warm(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("org/model")
    first = load(store, "org/model")
    assert_equal(first.tensors, path)
    assert first.stats.store_bytes == 0
    assert first.stats.disk_bytes + first.stats.page_cache_bytes == first.stats.bytes
    second = load(store, "org/model")
    assert_equal(second.tensors, path)
    assert second.stats.store_bytes == second.stats.bytes
    assert second.stats.disk_bytes == second.stats.page_cache_bytes == 0
    (model,) = store.status()["models"]
    assert model["name"] == "org/model"
    assert model["state"] == "warm"
    assert model["warm_bytes"] == model["bytes"]


def test_what_the_store_reads_from_disk_is_told_from_what_the_page_cache_had(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m")
    drop_from_cache(path)
    first = load(store, path)
    assert first.stats.disk_bytes == first.stats.bytes
    counters = store.status()["counters"]
    assert counters["bytes_disk"] >= first.stats.bytes
    assert counters["bytes_cache"] == 0
    assert counters["load_seconds"]["count"] == counters["loads"] == 1


def drop_from_cache(path: Path) -> None:
    """Take a model's files from the page cache, or skip where they stay."""
    for shard in path.glob("*.safetensors"):
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            facts = probe_file(file.fileno(), str(shard), 0, shard.stat().st_size)
        if facts.resident_bytes or not facts.residency_known:
            pytest.skip("this filesystem keeps files in memory")


def test_a_lease_lasts_as_long_as_the_last_tensor(
    store: RunningStore, make_model: MakeModel
) -> None:
    tensors = load(store, make_model("m")).tensors
    (lease,) = store.status()["leases"]
    assert lease["pid"] == os.getpid()
    kept = tensors.pop("big.1")
    tensors.clear()
    gc.collect()
    assert len(store.status()["leases"]) == 1
    del kept
    gc.collect()
    store.wait_for(lambda status: not status["leases"])


def test_a_model_larger_than_the_pool_is_warm_as_far_as_it_fits(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("large", mib=160)
    for round_number in range(3):
        loaded = load(store, path)
        assert_equal(loaded.tensors, path)
        stats = loaded.stats
        assert stats.store_bytes + stats.disk_bytes + stats.page_cache_bytes == stats.bytes
        if round_number:
            assert stats.store_bytes >= 60 * MIB
        del loaded
        gc.collect()
    assert store.status()["pool"]["used_bytes"] <= 64 * MIB


def test_the_least_recently_used_model_makes_room(
    store: RunningStore, make_model: MakeModel
) -> None:
    for name in ("a", "b", "c"):
        path = make_model(name, mib=27, seed=ord(name))
        assert_equal(load(store, path).tensors, path)
        gc.collect()
    warm = {
        model["name"]: model["warm_bytes"] / model["bytes"] for model in store.status()["models"]
    }
    assert warm[str(store.storage / "c")] == 1.0
    assert warm.get(str(store.storage / "a"), 0.0) < 1.0


def test_a_tensor_in_use_never_changes_while_others_come_and_go(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("kept", mib=20)
    kept = load(store, path).tensors
    for number in range(6):
        other = make_model(f"other{number}", mib=50, seed=100 + number)
        assert_equal(load(store, other).tensors, other)
        gc.collect()
    assert_equal(kept, path)


def test_memory_without_its_lease_is_an_orphan_and_is_not_recycled(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("orphan", mib=20)
    client = StoreClient(store.socket)
    from sllmctl.core.checkpoint import open_checkpoint
    from sllmctl.store.load import load_through_store

    tensors = load_through_store(
        open_checkpoint(path), LoadOptions(), client, label="orphan"
    ).tensors
    client.close()  # a process that forgets its lease, and keeps its mapping
    store.wait_for(lambda status: not status["leases"])
    with StoreClient(store.socket) as asking:
        asking.ask({"op": "evict", "name": "orphan"})
    assert store.status()["pool"]["orphaned_bytes"] > 20 * MIB
    for number in range(3):
        load(store, make_model(f"churn{number}", mib=60, seed=number))
        gc.collect()
    assert_equal(tensors, path)
    tensors.clear()
    gc.collect()
    store.wait_for(lambda status: status["pool"]["orphaned_bytes"] == 0)


def test_writes_reach_neither_the_pool_nor_another_client(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m")
    first = load(store, path).tensors
    second = load(store, path).tensors
    for tensor in first.values():
        tensor.zero_()
    assert_equal(second, path)
    assert_equal(load(store, path).tensors, path)


def test_verify_reads_what_the_store_gave(
    store: RunningStore, make_model: MakeModel, tmp_path: Path
) -> None:
    from sllmctl import convert

    path = convert(make_model("plain"), tmp_path / "models" / "converted")
    for _ in range(2):
        loaded = load(store, path, options=LoadOptions(verify=True))
        assert loaded.stats.verified


def test_a_replaced_checkpoint_is_another_model_and_old_leases_keep_old_bytes(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m", seed=1)
    old = load(store, path).tensors
    before = {name: tensor.clone() for name, tensor in old.items()}
    new_path = make_model("m-new", seed=2)
    for file in path.iterdir():
        (new_path / file.name).replace(file)
    assert_equal(load(store, path).tensors, path)
    assert all(same_bits(old[name], before[name]) for name in before)
    assert not same_bits(load(store, path).tensors["big.0"], before["big.0"])


def test_a_load_goes_to_disk_when_no_store_answers(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model("m")
    nowhere = tmp_path / "no.sock"
    assert_equal(api.load(path, socket=nowhere).tensors, path)
    with pytest.raises(StoreUnreachable, match=r"no store answers at .*no\.sock"):
        api.load(path, store="require", socket=nowhere)


def test_a_load_survives_the_death_of_the_store(
    start_store: Callable[..., RunningStore], make_model: MakeModel
) -> None:
    store = start_store()
    path = make_model("m", mib=40)
    tensors = load(store, path).tensors
    store.end(signal.SIGKILL)
    assert_equal(tensors, path)
    assert_equal(load(store, path, store="auto").tensors, path)


def test_a_killed_client_leaves_nothing_behind(store: RunningStore, make_model: MakeModel) -> None:
    path = make_model("m", mib=30)
    load(store, path)
    gc.collect()
    descriptors = store.open_descriptors()
    script = (
        "import sys, time; from pathlib import Path; from sllmctl import api\n"
        f"kept = api.load({str(path)!r}, store='require', socket=Path({str(store.socket)!r}))\n"
        "print('loaded', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "loaded\n"
    assert [lease["pid"] for lease in store.status()["leases"]] == [child.pid]
    child.kill()
    child.communicate()
    status = store.wait_for(lambda status: not status["leases"])
    assert status["pool"]["orphaned_bytes"] == 0
    # The connection of the last question may still be closing.
    store.wait_for(lambda _: store.open_descriptors() <= descriptors + 1)


def test_a_warm_model_is_shared_memory_and_not_a_copy(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m", mib=40)
    load(store, path)
    gc.collect()
    before = anonymous_bytes()
    tensors = load(store, path).tensors
    total = sum(int(tensor.view(torch.uint8).sum()) for tensor in tensors.values() if tensor.dim())
    assert total > 0
    assert anonymous_bytes() - before < 10 * MIB


def test_a_client_hears_of_a_fill_that_takes_long(
    start_store: Callable[..., RunningStore], make_model: MakeModel
) -> None:
    """A slow disk is no store that is gone: its clients gave it up, and read the disk as well."""
    store = start_store(
        before="import time; from sllmctl.store import daemon, filler\n"
        "follow = filler._follow; daemon._REASSURE_EVERY_S = 0.05\n"
        "filler._follow = lambda *args: (time.sleep(1.5), follow(*args))[1]"
    )
    path = make_model("m")
    with StoreClient(store.socket) as client:
        client.ask({"op": "warm", "name": "m"})
        messages = []
        while not messages or messages[-1]["event"] != "settled":
            messages.append(client.receive(deadline_s=0.75)[0])
        assert messages[0] == {"event": "ready", "pieces": [], "warm_bytes": 0}
        assert messages[-1]["missing"] == []
    store.wait_for(lambda status: not status["leases"])
    with StoreClient(store.socket) as client:
        client.ask({"op": "evict", "name": "m"})
    assert_equal(load(store, path).tensors, path)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")

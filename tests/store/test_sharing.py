"""One copy of a model for all, and bytes that never change under those who see them."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sllmctl.native import Segment
from tests.store.conftest import MIB, RunningStore
from tests.store.test_named import assert_equal, bytes_of, warm
from tests.store.test_store import drop_from_cache, load
from tests.torture.store_client import digest_of_files

MakeModel = Callable[..., Path]

# Maps a model as any client does, and looks at every byte; torch is not needed for that.
CLIENT = """
import os, sys
from pathlib import Path
from sllmctl.native import PAGE_BYTES, Memory
from sllmctl.store.client import StoreClient
from sllmctl.store.named import NamedModel
import xxhash

client = StoreClient(Path(sys.argv[1]))
model = NamedModel(client, sys.argv[2])
memories = [Memory.create(shard.size) for shard in model.checkpoint.shards]
for (shard, index), fd in model.held.items():
    nbytes = -(-model.delivery.nbytes((shard, index)) // PAGE_BYTES) * PAGE_BYTES
    memories[shard].place(index * client.segment_bytes, fd, nbytes)
model.close()

def digest():
    hasher = xxhash.xxh3_128()
    for memory in memories:
        hasher.update(memory.buffer)
    return hasher.hexdigest()

def say(what):
    print(what, flush=True)

say(digest())
"""


def start(store: RunningStore, name: str, then: str) -> subprocess.Popen[str]:
    """A client that has mapped a model, said its digest, and does something then."""
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT + then, str(store.socket), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_eight_processes_share_one_copy(store: RunningStore, make_model: MakeModel) -> None:
    path = make_model("m", mib=40)
    total = sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
    warm(store, "m")
    measure = (
        "sys.stdin.readline()\n"
        "rows = Path('/proc/self/smaps_rollup').read_text().splitlines()\n"
        "say({r.split(':')[0]: r.split()[1] for r in rows[1:]}['Pss'])\n"
        "say({r.split(':')[0]: r.split()[1] for r in rows[1:]}['Rss'])\n"
        "sys.stdin.readline()"
    )
    clients = [start(store, "m", measure) for _ in range(8)]
    bare = start(store, "m", "del memories, model, client\n" + measure)
    try:
        assert {line_of(client) for client in [*clients, bare]} == {digest_of_files(path)}
        proportional, resident = [], []
        for client in [*clients, bare]:
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()
            proportional.append(int(line_of(client)) * 1024)
            resident.append(int(line_of(client)) * 1024)
    finally:
        for client in [*clients, bare]:
            client.communicate()
    *those, without = proportional
    # Nine share it, the store among them; what else a client takes, one without the model does too.
    assert min(resident[:-1]) > total
    assert sum(those) - 8 * without < 1.1 * total


def test_bytes_stay_as_they_are_for_a_child_that_outlives_client_and_lease(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("kept", mib=20)
    want = digest_of_files(path)
    warm(store, "kept")
    outlive = (
        "client.close()\n"
        "if os.fork():\n"
        "    os._exit(0)\n"
        "say('alone')\n"
        "sys.stdin.readline()\n"
        "say(digest())\n"
    )
    client = start(store, "kept", outlive)
    assert line_of(client) == want
    assert line_of(client) == "alone"
    assert client.wait() == 0
    store.wait_for(lambda status: not status["leases"])
    for number in range(4):
        other = make_model(f"other{number}", mib=50, seed=number)
        loaded = load(store, other)
        assert_equal(loaded.tensors, bytes_of(other))
        del loaded
        gc.collect()
    status = store.status()
    assert "kept" not in [model["name"] for model in status["models"] if model["warm_bytes"]]
    assert status["pool"]["orphaned_bytes"] > 20 * MIB
    assert client.stdin is not None
    client.stdin.write("\n")
    client.stdin.flush()
    assert line_of(client) == want
    client.communicate()
    store.wait_for(lambda status: status["pool"]["orphaned_bytes"] == 0)


def test_an_empty_page_cache_leaves_warm_loads_whole(
    store: RunningStore, make_model: MakeModel
) -> None:
    path = make_model("m", mib=20)
    want = bytes_of(path)
    warm(store, "m")
    drop_from_cache(path)
    before = store.status()["counters"]
    loaded = load(store, path)
    assert loaded.stats.store_bytes == loaded.stats.bytes
    assert_equal(loaded.tensors, want)
    after = store.status()["counters"]
    assert (after["bytes_disk"], after["bytes_cache"]) == (
        before["bytes_disk"],
        before["bytes_cache"],
    )


OLD_KERNEL = """
import sllmctl.store.daemon as d
from functools import partial
from sllmctl.native import Segment
from sllmctl.store.backing import Backing
d.choose_backing = lambda *_: Backing("memfd", 4096, partial(Segment, as_before={version}))
"""


class TestKernelsBefore:
    """Where memory is sealed when it is full (5.1), and leases do not tell who holds it (5.3)."""

    @pytest.mark.parametrize("version", [(5, 1), (5, 3)])
    def test_models_come_and_go_with_every_byte_right(
        self,
        start_store: Callable[..., RunningStore],
        make_model: MakeModel,
        version: tuple[int, int],
    ) -> None:
        store = start_store(before=OLD_KERNEL.format(version=version))
        kept_path = make_model("kept", mib=20)
        kept = load(store, kept_path).tensors
        descriptors = []
        for number in range(5):
            path = make_model(f"m{number}", mib=30, seed=number)
            for _ in range(2):
                loaded = load(store, path)
                assert_equal(loaded.tensors, bytes_of(path))
                last = loaded.stats
                del loaded
                gc.collect()
            assert last.store_bytes == last.bytes
            descriptors.append(store.open_descriptors(segments=True))
        assert_equal(kept, bytes_of(kept_path))
        pool = store.status()["pool"]
        assert pool["used_bytes"] <= pool["bytes"]
        assert pool["orphaned_bytes"] == 0
        assert max(descriptors[2:]) <= descriptors[1] + 8

    def test_a_segment_says_what_it_can(self) -> None:
        assert not Segment(2 * MIB, as_before=(5, 1)).recyclable
        assert not Segment(2 * MIB, as_before=(5, 3)).recyclable

"""A store and its clients, end to end: every byte right, wherever it comes from."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sllmctl import api, load_tensors
from sllmctl.core.load import Loaded, LoadOptions
from sllmctl.errors import StoreError, StoreUnreachable
from sllmctl.native import probe_file
from sllmctl.store.client import StoreClient
from sllmctl.store.protocol import encode
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


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")


class TestCommands:
    def test_warm_status_and_evict(
        self, store: RunningStore, make_model: MakeModel, sllmctl_json: Callable[..., object]
    ) -> None:
        make_model("org/model", mib=9)
        (row,) = sllmctl_json("warm", "org/model", "--pin")["models"]  # type: ignore[index]
        assert row["warm_bytes"] == row["bytes"] == row["read_bytes"]
        status = sllmctl_json("status")
        (model,) = status["models"]  # type: ignore[index]
        assert (model["name"], model["pinned"], model["state"]) == ("org/model", True, "warm")
        assert set(status["pool"]) == {  # type: ignore[index]
            *("bytes", "used_bytes", "pinned_bytes", "leased_bytes", "orphaned_bytes"),
            *("segment_bytes", "page_bytes", "backing", "locked", "prefaulted_bytes"),
        }
        assert sllmctl_json("evict", "org/model")["bytes"] == row["bytes"]  # type: ignore[index]
        assert sllmctl_json("status")["models"] == []  # type: ignore[index]

    def test_what_was_warmed_is_told_although_another_name_failed(
        self, store: RunningStore, make_model: MakeModel
    ) -> None:
        make_model("a")
        make_model("c", seed=3)
        command = [sys.executable, "-m", "sllmctl", "warm", "a", "b", "c", "--json"]
        done = subprocess.run(
            [*command, "--socket", str(store.socket)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 5
        assert "error: no checkpoint at" in done.stderr
        a, b, c = json.loads(done.stdout)["models"]
        assert a["warm_bytes"] == a["bytes"] > 0
        assert c["warm_bytes"] == c["bytes"] > 0
        assert (a["problem"], c["problem"]) == (None, None)
        assert "no checkpoint" in b["problem"]
        assert b["warm_bytes"] == 0

    def test_the_live_view_shows_rates(self, store: RunningStore, make_model: MakeModel) -> None:
        make_model("m")
        command = [sys.executable, "-m", "sllmctl", "status", "--watch"]
        with subprocess.Popen(
            [*command, "--socket", str(store.socket)], stdout=subprocess.PIPE, text=True
        ) as watching:
            assert watching.stdout is not None
            for line in watching.stdout:
                if line.startswith("rates"):
                    break
            watching.terminate()
        assert re.search(r"from disk, .* from page cache, .* from memory, 0\.0 loads/s", line)

    def test_a_model_in_use_is_not_evicted_and_its_users_are_named(
        self, store: RunningStore, make_model: MakeModel
    ) -> None:
        tensors = load(store, make_model("m"), label="m").tensors
        with StoreClient(store.socket) as client:
            with pytest.raises(StoreError, match=f"in use by pid {os.getpid()}"):
                client.ask({"op": "evict", "name": "m"})
            assert client.ask({"op": "evict", "name": None})["kept"]
        assert tensors

    @pytest.mark.parametrize("name", ["../models/m", "/etc", "..", "", "a/../../m", "out"])
    def test_a_name_that_leads_out_of_the_storage_is_refused(
        self, store: RunningStore, make_model: MakeModel, tmp_path: Path, name: str
    ) -> None:
        make_model("m")
        outside = tmp_path / "outside"
        (store.storage / "m").rename(outside)
        (store.storage / "out").symlink_to(outside)
        with StoreClient(store.socket) as client, pytest.raises(StoreError):
            client.ask({"op": "warm", "name": name})

    def test_preload_warms_at_the_start(
        self, start_store: Callable[..., RunningStore], make_model: MakeModel
    ) -> None:
        make_model("org/model")
        store = start_store("--preload", "org/model")
        status = store.wait_for(lambda status: all(m["state"] == "warm" for m in status["models"]))
        assert [model["name"] for model in status["models"]] == ["org/model"]
        assert status["leases"] == []


@pytest.fixture
def sllmctl_json(store: RunningStore) -> Callable[..., object]:
    def run(*arguments: str) -> object:
        command = [sys.executable, "-m", "sllmctl", *arguments]
        done = subprocess.run(
            [*command, "--socket", str(store.socket), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


class TestLifecycle:
    def test_the_greeting_says_all_that_a_person_needs(self, store: RunningStore) -> None:
        text = "\n".join(store.greeting)
        assert str(store.socket) in text
        assert "67.1 MB in 32 segments of 2.1 MB" in text
        assert str(store.storage) in text
        assert re.search(r"memory   pages of (2\.1 MB|\d+\.\d KB) in a (tmpfs|memfd), ", text)

    def test_its_log_can_be_json(
        self, start_store: Callable[..., RunningStore], make_model: MakeModel
    ) -> None:
        store = start_store("--json-logs", "--io-threads", "2", verbose=True)
        with StoreClient(store.socket) as client, pytest.raises(StoreError):
            client.ask({"op": "attach", "label": 5})
        store.process.terminate()
        _, errors = store.process.communicate(timeout=60)
        lines = [json.loads(line) for line in errors.splitlines()]
        assert {"time", "level", "logger", "message"} <= set(lines[0])
        assert f"client pid {os.getpid()} of user {os.getuid()}" in [
            line["message"] for line in lines
        ]

    def test_sigterm_ends_it_with_0_and_without_a_socket(
        self, start_store: Callable[..., RunningStore]
    ) -> None:
        store = start_store()
        assert store.end() == 0
        assert not store.socket.exists()

    def test_a_socket_in_use_is_refused_and_a_stale_one_replaced(
        self, start_store: Callable[..., RunningStore]
    ) -> None:
        first = start_store()
        with pytest.raises(AssertionError, match="serves .* already"):
            start_store()
        first.end(signal.SIGKILL)
        assert first.socket.exists()
        assert start_store().status()["models"] == []

    def test_a_pool_larger_than_the_machine_is_refused(
        self, start_store: Callable[..., RunningStore]
    ) -> None:
        with pytest.raises(AssertionError, match="is more than the .* have left"):
            start_store(pool="100TB")

    def test_it_tells_systemd_when_clients_can_come(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(path))
            sock.settimeout(30)
            monkeypatch.setenv("NOTIFY_SOCKET", str(path))
            store = RunningStore(tmp_path)
            assert sock.recv(100) == b"READY=1"
        assert store.end() == 0

    def test_the_socket_is_the_owners_alone(self, store: RunningStore) -> None:
        assert store.socket.stat().st_mode & 0o777 == 0o600


class TestMetrics:
    def test_a_scrape_shows_the_pool_and_what_was_loaded(
        self, start_store: Callable[..., RunningStore], make_model: MakeModel
    ) -> None:
        port = free_port()
        store = start_store("--metrics", f"127.0.0.1:{port}")
        loaded = load(store, make_model("m"), label="m")
        gc.collect()
        text = get(port, "/metrics")
        assert "sllm_pool_bytes 6.7108864e+07" in text
        assert 'sllm_model_warm_bytes{model="m"}' in text
        assert "sllm_loads_total 1.0" in text
        assert 'sllm_load_seconds_bucket{le="+Inf"} 1.0' in text
        assert 'sllm_load_seconds_bucket{le="300"} 1.0' in text
        assert 'sllm_bytes_total{source="page_cache"}' in text
        assert "sllm_leases 1.0" in text
        assert 'sllm_pool_part_bytes{part="orphaned"} 0.0' in text
        assert get(port, "/healthz") == "ok\n"
        assert loaded.tensors

    @pytest.mark.parametrize("address", ["9464", "localhost", "127.0.0.1:x", ":1"])
    def test_an_address_that_is_none_is_refused(self, address: str) -> None:
        from sllmctl.errors import ConfigError
        from sllmctl.store.metrics import parse_address

        with pytest.raises(ConfigError, match="is no address"):
            parse_address(address)

    def test_nothing_listens_on_tcp_unless_asked(self, store: RunningStore) -> None:
        descriptors = Path(f"/proc/{store.process.pid}/fd").iterdir()
        inodes = {str(descriptor.readlink()) for descriptor in descriptors}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{store.process.pid}/net/{table}").read_text().splitlines()[1:]:
                assert f"socket:[{line.split()[9]}]" not in inodes


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(port: int, path: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return str(answer.read().decode())


class TestHostileClients:
    @pytest.mark.parametrize(
        "raw",
        [
            b"\n",
            b"\x00" * 100 + b"\n",
            b"x" * (2 << 20),
            encode({"op": "attach", "label": "x"}),
            encode({"op": "hello", "version": 99}),
            encode({"op": "hello", "version": 1}) + encode({"op": "attach"}),
            encode({"op": "hello", "version": 1}) + encode({"op": "attach", "label": "x"}),
            encode({"op": "hello", "version": 1}) + encode({"op": "shards", "names": ["x"]}),
            encode({"op": "hello", "version": 1}) + encode({"op": "warm", "name": 5}),
            encode({"op": "hello", "version": 1}) + encode({"op": "evict", "name": ["x"]}),
            encode({"op": "hello", "version": 1}) + encode({"op": [], "fds": 3}),
        ],
    )
    def test_a_message_that_makes_no_sense_hurts_nobody_else(
        self, store: RunningStore, raw: bytes
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect(str(store.socket))
            try:
                sock.sendall(raw)
                sock.recv(1 << 16)
            except OSError:
                pass
        assert store.status()["models"] == []

    def test_what_is_no_regular_file_is_refused(self, store: RunningStore) -> None:
        reader, writer = os.pipe()
        with StoreClient(store.socket) as client:
            client.send_shards(["pipe"], [reader])
            client.send({"op": "attach", "label": "pipe"})
            with pytest.raises(StoreError, match="regular file"):
                client.receive()
        os.close(reader)
        os.close(writer)

    def test_a_client_that_leaves_half_way_costs_nothing(
        self, store: RunningStore, make_model: MakeModel
    ) -> None:
        path = make_model("m", mib=30)
        before = store.open_descriptors()
        shards = sorted(path.glob("*.safetensors"))
        for messages in range(3):
            fds = [os.open(shard, os.O_RDONLY) for shard in shards]
            client = StoreClient(store.socket)
            if messages > 0:
                client.send_shards([shard.name for shard in shards], fds)
            if messages > 1:
                client.send({"op": "attach", "label": "m"})
            client.close()
            for fd in fds:
                os.close(fd)
        store.wait_for(lambda status: all(m["state"] != "loading" for m in status["models"]))
        assert_equal(load(store, path).tensors, path)
        gc.collect()
        # A segment has two descriptors of its own, and stays.
        segments = store.status()["pool"]["used_bytes"] // (2 * MIB)
        limit = before + 2 * max(segments, 32)
        store.wait_for(lambda _: store.open_descriptors() <= limit)


class TestRights:
    @pytest.mark.parametrize("flags", [os.O_PATH, os.O_WRONLY])
    def test_a_descriptor_that_gives_no_right_to_read_is_refused(
        self, store: RunningStore, make_model: MakeModel, flags: int
    ) -> None:
        """The store opens it anew with its own rights, which may be more than the client's."""
        (shard, *_) = sorted(make_model("m").glob("*.safetensors"))
        fd = os.open(shard, flags)
        with StoreClient(store.socket) as client:
            client.send_shards([shard.name], [fd])
            with pytest.raises(StoreError, match="is not open for reading"):
                client.receive()
        os.close(fd)


def test_evict_all_leaves_what_is_pinned(store: RunningStore, make_model: MakeModel) -> None:
    make_model("m")
    with StoreClient(store.socket) as client:
        client.ask({"op": "warm", "name": "m", "pin": True})
        while client.receive()[0]["event"] != "settled":
            pass
        client.ask({"op": "detach"})
        answer = client.ask({"op": "evict", "name": None})
        assert answer["bytes"] == 0
        assert answer["kept"] == ["`m` is pinned: name it to evict it"]
        assert client.ask({"op": "evict", "name": "m"})["bytes"] > 0


def test_a_store_that_ends_leaves_its_successors_socket_alone(
    start_store: Callable[..., RunningStore],
) -> None:
    first = start_store()
    first.socket.unlink()
    with pytest.raises(AssertionError, match="serves .* already"):
        start_store()
    assert first.end() == 0
    second = start_store()
    assert second.status()["models"] == []

"""`serve`, `status`, `warm`, `evict`: the commands, the life of a store, its metrics."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from sllmctl.errors import StoreError, StoreUnreachable
from sllmctl.store.client import StoreClient
from tests.store.conftest import RunningStore
from tests.store.test_store import MakeModel, load

SLOW_FILL = """
import time
from sllmctl.store import filler
follow = filler._follow
filler._follow = lambda *args: (time.sleep(2), follow(*args))[1]
"""


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
        assert "error: there is no checkpoint `b` in the store's" in done.stderr
        assert "hint: `sllmctl ls --storage-path" in done.stderr
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

    def test_preload_tells_of_what_found_no_room(
        self, start_store: Callable[..., RunningStore], make_model: MakeModel
    ) -> None:
        make_model("m", mib=9)
        store = start_store("--preload", "m", pool="6MiB")
        store.wait_for(lambda status: [m["state"] for m in status["models"]] == ["partial"])
        store.process.terminate()
        _, errors = store.process.communicate(timeout=60)
        assert "warning: only 5.25 MB of `m`, which is 9.5 MB, found room in the pool" in errors


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
        assert re.search(r"memory   (2 MiB|\d+ KiB) pages in a (tmpfs|memfd), ", text)

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

    def test_a_store_that_is_started_while_another_ends_waits_for_it(
        self, start_store: Callable[..., RunningStore], make_model: MakeModel
    ) -> None:
        first = start_store(before=SLOW_FILL)
        make_model("m")
        with StoreClient(first.socket) as client:
            client.ask({"op": "warm", "name": "m"})
            first.process.terminate()
            while first.socket.exists():
                time.sleep(0.01)
            second = start_store()
            assert first.process.wait(timeout=60) == 0
        assert second.status()["models"] == []

    @pytest.mark.parametrize("signals", [1, 2])
    def test_sigterm_lets_a_load_end_and_takes_no_other_client(
        self, start_store: Callable[..., RunningStore], make_model: MakeModel, signals: int
    ) -> None:
        store = start_store(before=SLOW_FILL)
        make_model("m")
        with StoreClient(store.socket) as client:
            client.ask({"op": "warm", "name": "m"})
            for _ in range(signals):
                store.process.terminate()
                time.sleep(0.5)
            with pytest.raises(StoreUnreachable):
                StoreClient(store.socket)
            if signals == 2:
                with pytest.raises(StoreError):
                    client.receive()
            else:
                while (message := client.receive()[0])["event"] != "settled":
                    pass
                assert message["missing"] == []
        assert store.end() == 0

    def test_a_socket_in_use_is_refused_and_a_stale_one_replaced(
        self, start_store: Callable[..., RunningStore]
    ) -> None:
        first = start_store()
        with pytest.raises(AssertionError, match="serves .* already"):
            start_store()
        first.end(signal.SIGKILL)
        assert first.socket.exists()
        assert start_store().status()["models"] == []

    def test_what_is_no_socket_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "store.sock").write_text("mine")
        with pytest.raises(AssertionError, match="it is there already, and no socket"):
            RunningStore(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["store.sock"]

    def test_a_pool_larger_than_the_machine_is_refused(
        self, start_store: Callable[..., RunningStore]
    ) -> None:
        with pytest.raises(AssertionError, match="is more than the .* are free"):
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

    def test_a_service_manager_that_is_gone_keeps_nobody_from_starting(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
        store = RunningStore(tmp_path)
        assert store.status()["models"] == []
        store.process.terminate()
        _, errors = store.process.communicate(timeout=60)
        assert "warning: cannot say READY=1 at" in errors
        assert store.process.returncode == 0

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

    def test_two_versions_of_a_model_are_one_line(
        self, start_store: Callable[..., RunningStore], make_model: MakeModel
    ) -> None:
        """Prometheus refuses a second sample of the same name and labels."""
        port = free_port()
        store = start_store("--metrics", f"127.0.0.1:{port}")
        for seed in range(2):
            load(store, make_model("m", seed=seed), label="m")
            gc.collect()
        warm = sum(model["warm_bytes"] for model in store.status()["models"])
        lines = [one for one in get(port, "/metrics").splitlines() if '{model="m"}' in one]
        assert [float(line.split()[1]) for line in lines] == [warm]

    def test_a_store_that_does_not_answer_is_unhealthy(self) -> None:
        from concurrent import futures

        from sllmctl.store.metrics import serve_metrics

        def ask() -> dict[str, object]:
            raise futures.TimeoutError

        port = free_port()
        server = serve_metrics(f"127.0.0.1:{port}", ask)
        try:
            for path in ("/metrics", "/healthz"):
                with pytest.raises(urllib.error.HTTPError, match="503"):
                    get(port, path)
        finally:
            server.shutdown()
            server.server_close()

    def test_a_client_that_says_nothing_is_hung_up_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sllmctl.store import metrics

        monkeypatch.setattr(metrics, "REQUEST_DEADLINE_S", 0.1)
        port = free_port()
        server = metrics.serve_metrics(f"127.0.0.1:{port}", dict)
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
                sock.sendall(b"GET /metr")
                assert sock.recv(100) == b""
        finally:
            server.shutdown()
            server.server_close()

    @pytest.mark.parametrize("address", ["9464", "localhost", "127.0.0.1:x", ":1"])
    def test_an_address_that_is_none_is_refused(self, address: str) -> None:
        from sllmctl.errors import ConfigError
        from sllmctl.store.metrics import parse_address

        with pytest.raises(ConfigError, match="is not an address"):
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


def test_evict_all_leaves_what_is_pinned(store: RunningStore, make_model: MakeModel) -> None:
    make_model("m")
    with StoreClient(store.socket) as client:
        client.ask({"op": "warm", "name": "m", "pin": True})
        while client.receive()[0]["event"] != "settled":
            pass
    store.wait_for(lambda status: not status["leases"])
    with StoreClient(store.socket) as client:
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

"""Clients that break the protocol, lie, or leave half-way."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable

import pytest

from sllmctl.errors import StoreError, StoreUnreachable
from sllmctl.store.client import StoreClient
from sllmctl.store.protocol import encode
from tests.store.conftest import RunningStore
from tests.store.test_store import MakeModel, assert_equal, load


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
        store.wait_for(lambda _: store.open_descriptors() <= before + 1)  # who asks has one

    def test_files_that_no_attach_follows_are_not_kept_for_ever(
        self, start_store: Callable[..., RunningStore], make_model: MakeModel
    ) -> None:
        store = start_store(
            before="from sllmctl.store import session; session.ATTACH_DEADLINE_S = 1"
        )
        shards = sorted(make_model("m").glob("*.safetensors"))
        fds = [os.open(shard, os.O_RDONLY) for shard in shards]
        patient = StoreClient(store.socket)
        patient.send_shards([shard.name for shard in shards], fds)
        assert patient.ask({"op": "attach", "label": "m"})["shards"] == len(shards)
        while patient.receive()[0]["event"] != "settled":
            pass
        before = store.open_descriptors()
        client = StoreClient(store.socket)
        client.send_shards([shard.name for shard in shards], fds)
        with pytest.raises(StoreUnreachable, match="closed the connection"):
            client.receive()
        store.wait_for(lambda _: store.open_descriptors() <= before + 1)  # who asks has one
        assert patient.ask({"op": "status"})["leases"]
        patient.close()
        for fd in fds:
            os.close(fd)


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

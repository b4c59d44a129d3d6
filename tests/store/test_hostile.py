"""Clients that break the protocol, lie, or leave half-way."""

from __future__ import annotations

import gc
import os
import socket
from contextlib import suppress

import pytest

from sllmctl.errors import StoreError, StoreUnreachable
from sllmctl.store.client import StoreClient
from sllmctl.store.protocol import encode
from tests.store.conftest import MIB, RunningStore
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
        # A segment has two descriptors of its own, and stays.
        segments = store.status()["pool"]["used_bytes"] // (2 * MIB)
        limit = before + 2 * max(segments, 32)
        store.wait_for(lambda _: store.open_descriptors() <= limit)

    def test_files_handed_over_before_a_detach_are_closed_and_no_part_of_the_next_attach(
        self, store: RunningStore, make_model: MakeModel
    ) -> None:
        shards = sorted(make_model("m").glob("*.safetensors"))
        fds = [os.open(shard, os.O_RDONLY) for shard in shards]
        store.status()
        with StoreClient(store.socket) as client:
            before = store.open_descriptors()
            client.send_shards([shard.name for shard in shards], fds)
            client.ask({"op": "detach"})
            assert store.open_descriptors() == before
            client.send_shards([shards[0].name], fds[:1])
            assert client.ask({"op": "attach", "label": "m"})["shards"] == 1
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

    def test_a_client_that_detaches_before_it_takes_its_segments_gets_none(
        self, store: RunningStore, make_model: MakeModel
    ) -> None:
        """Sent later, they could hold another model's bytes by then."""
        path = make_model("m")
        load(store, path)
        gc.collect()
        shards = sorted(path.glob("*.safetensors"))
        fds = [os.open(shard, os.O_RDONLY) for shard in shards]
        client = StoreClient(store.socket)
        client.send_shards([shard.name for shard in shards], fds)
        for fd in fds:
            os.close(fd)
        for _ in range(1000):  # more answers than the socket takes
            client.send({"op": "status"})
        client.send({"op": "attach", "label": "m"})
        client.send({"op": "detach"})
        # Only when both have been handled is anything taken.
        store.wait_for(lambda status: status["counters"]["loads"] == 2 and not status["leases"])
        messages = []
        with suppress(StoreUnreachable):
            while True:
                messages.append(client.receive())
        assert {message["event"] for message, _ in messages} == {"status"}
        assert not any(parts for _, parts in messages)

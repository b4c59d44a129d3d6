"""A whole connection to a store as a fuzz target: any bytes, and what the store makes of them."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

from sllmctl.store.files import open_named
from sllmctl.store.keeper import Keeper
from sllmctl.store.lookups import Lookups
from sllmctl.store.pool import Pool
from sllmctl.store.protocol import encode
from sllmctl.store.residency import StoredModel
from sllmctl.store.service import Service, Settings
from sllmctl.store.session import Session
from tests.raw import write_raw

SEGMENT = 2 * 2**20
HELLO = encode({"op": "hello", "version": 1})


@functools.cache
def service() -> tuple[asyncio.AbstractEventLoop, Service, StoredModel, int]:
    """A store without a listener that holds the model ``gone``, in use, whose files are gone.

    Returns:
        Its loop, itself, the model, and an open descriptor of the model's file.
    """
    loop = asyncio.new_event_loop()
    storage = Path(tempfile.mkdtemp(prefix="sllmctl-fuzz-"))
    (storage / "gone").mkdir()
    shard = storage / "gone" / "model.safetensors"
    write_raw(shard, {}, b"")
    settings = Settings(storage, storage / "sock", 2 * SEGMENT, SEGMENT)
    keeper = Keeper(Pool(2 * SEGMENT, SEGMENT), loop.call_soon_threadsafe)
    files = open_named(storage, "gone")
    lease = keeper.attach(
        files, pid=0, arrived=lambda _: None, settled=lambda _: loop.call_soon(loop.stop)
    )
    loop.run_forever()
    (storage / "gone").rename(storage / ".moved")  # the file itself stays as it is
    return loop, Service(settings, keeper, Lookups(loop)), lease.model, files.fds[0]


def session(data: bytes) -> None:
    """A client that sends these bytes with two descriptors, and leaves.

    Whatever it says, the store answers with messages, holds nothing of it afterwards, and raises
    nothing into its loop.
    """
    loop, store, model, shard = service()
    failures: list[object] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))
    before = len(os.listdir("/proc/self/fd"))

    async def talk() -> None:
        left, right = socket.socketpair()
        client = Session(store, right, lambda _: None)
        left.setblocking(False)
        reader, writer = os.pipe()
        with suppress(OSError):
            socket.send_fds(left, [data or b"\n"], [shard, reader])
        os.close(reader)
        os.close(writer)
        for _ in range(3):
            await asyncio.sleep(0)
        while store.lookups.waiting:
            await asyncio.sleep(0)
        client.end()
        left.close()

    loop.run_until_complete(talk())
    assert failures == []
    assert list(store.keeper.models.values()) == [model]
    assert model.warm_bytes == model.nbytes
    assert len(model.leases) == 1
    assert len(os.listdir("/proc/self/fd")) == before


def seeds() -> list[bytes]:
    """Sessions as clients have them."""
    return [
        HELLO,
        HELLO + encode({"op": "status"}),
        HELLO
        + encode({"op": "shards", "names": ["model.safetensors"], "fds": 1})
        + encode({"op": "attach", "label": "gone"}),
        HELLO + encode({"op": "shards", "names": ["model.safetensors", "pipe"], "fds": 2}),
        HELLO + encode({"op": "attach", "name": "gone"}),
        HELLO + encode({"op": "attach", "name": "org/model"}),
        HELLO + encode({"op": "warm", "name": "gone", "pin": True}),
        HELLO + encode({"op": "evict", "name": "org/model"}),
        HELLO + encode({"op": "evict", "name": None}),
        encode({"op": "hello", "version": 2}),
    ]

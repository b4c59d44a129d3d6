"""A whole connection to a store as a fuzz target: any bytes, and what the store makes of them."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

from sllmctl.store.connection import Connection
from sllmctl.store.keeper import Keeper
from sllmctl.store.pool import Pool
from sllmctl.store.protocol import encode
from sllmctl.store.service import Service, Settings

SEGMENT = 2 * 2**20
HELLO = encode({"op": "hello", "version": 1})


@functools.cache
def service() -> tuple[asyncio.AbstractEventLoop, Service]:
    """A store without a listener, over an empty storage path."""
    loop = asyncio.new_event_loop()
    storage = Path(tempfile.mkdtemp(prefix="sllmctl-fuzz-"))
    settings = Settings(storage, storage / "sock", 2 * SEGMENT, SEGMENT)
    keeper = Keeper(Pool(2 * SEGMENT, SEGMENT), loop.call_soon_threadsafe)
    return loop, Service(settings, keeper)


def session(data: bytes) -> None:
    """A client that sends these bytes with a descriptor, and leaves.

    Whatever it says, the store answers with messages, holds nothing of it afterwards, and raises
    nothing into its loop.
    """
    loop, store = service()
    failures: list[object] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))
    before = len(os.listdir("/proc/self/fd"))

    async def talk() -> None:
        left, right = socket.socketpair()
        connection = Connection(store, right, lambda _: None)
        left.setblocking(False)
        reader, writer = os.pipe()
        with suppress(OSError):
            socket.send_fds(left, [data or b"\n"], [reader])
        os.close(reader)
        os.close(writer)
        for _ in range(3):
            await asyncio.sleep(0)
        connection.end()
        left.close()

    loop.run_until_complete(talk())
    assert failures == []
    assert store.keeper.models == {}
    assert len(os.listdir("/proc/self/fd")) == before


def seeds() -> list[bytes]:
    """Sessions as clients have them."""
    return [
        HELLO,
        HELLO + encode({"op": "status"}),
        HELLO + encode({"op": "shards", "names": ["model.safetensors"], "fds": 1}),
        HELLO + encode({"op": "attach", "label": "org/model"}),
        HELLO + encode({"op": "warm", "name": "org/model", "pin": True}),
        HELLO + encode({"op": "evict", "name": "org/model"}),
        HELLO + encode({"op": "evict", "name": None}) + encode({"op": "detach"}),
        encode({"op": "hello", "version": 2}),
    ]

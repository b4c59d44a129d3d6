"""One client's connection alone: what it holds, and when it is dropped."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Awaitable, Callable

import pytest

from sllmctl.native import Segment
from sllmctl.store.connection import Connection
from sllmctl.store.protocol import Message, encode

SEGMENT = 2 * 2**20


def with_connection(work: Callable[[Connection], Awaitable[None]]) -> None:
    """Run with the connection of a client that takes nothing."""

    async def run() -> None:
        ours, client = socket.socketpair()
        with client:
            connection = Connection(ours, lambda *_: None, lambda: None)
            connection.greet({"event": "hello"})
            await work(connection)
            connection.end()

    asyncio.run(run())


def test_a_file_that_cannot_be_copied_leaves_no_copy_of_the_others() -> None:
    async def work(connection: Connection) -> None:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="Bad file descriptor"):
            connection.send({"event": "files"}, files=[0, 1, -1])
        assert os.listdir("/proc/self/fd") == before

    with_connection(work)


def test_segments_for_which_no_descriptor_is_left_end_the_connection_and_nothing_stays_open() -> (
    None
):
    segment = Segment(SEGMENT)
    segment.complete()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def work(connection: Connection) -> None:
        free = os.dup(0)
        os.close(free)
        before = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, hard))
        try:
            connection.send({"event": "ready"}, [segment] * 3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert connection.ended
        assert len(os.listdir("/proc/self/fd")) == before - 1  # the socket

    with_connection(work)


def test_a_client_that_takes_nothing_is_dropped_however_often_it_is_told_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sllmctl.store.connection.SEND_DEADLINE_S", 0.2)

    async def work(connection: Connection) -> None:
        connection.send({"event": "x" * 2**20})  # more than the socket takes

        async def tell() -> None:
            while not connection.ended:
                connection.send({"event": "ready"})
                await asyncio.sleep(0.01)

        await asyncio.wait_for(tell(), 10)

    with_connection(work)


def test_a_client_that_says_much_at_once_lets_others_have_their_turn() -> None:
    order: list[str] = []

    def handle(message: Message, fds: list[int]) -> None:
        order.append(message["op"])

    async def run() -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        said = [encode({"op": "many"}) * 500, encode({"op": "one"})]
        for (_, client), lines in zip(pairs, said, strict=True):
            client.sendall(lines)
        connections = [Connection(ours, handle, lambda: None) for ours, _ in pairs]
        while len(order) < 501:
            await asyncio.sleep(0)
        for connection, (_, client) in zip(connections, pairs, strict=True):
            connection.end()
            client.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert order.index("one") < 100


def test_messages_that_come_while_one_waits_are_answered_in_their_order() -> None:
    order: list[int] = []

    async def run() -> None:
        ours, client = socket.socketpair()

        def handle(message: Message, fds: list[int]) -> None:
            order.append(message["n"])
            if message["n"] % 40 == 7:
                connection.pause()
                asyncio.get_running_loop().call_later(0.01, connection.resume)

        connection = Connection(ours, handle, lambda: None)
        for n in range(300):
            client.sendall(encode({"n": n}))
            if n % 50 == 0:
                await asyncio.sleep(0)
        while len(order) < 300:
            await asyncio.sleep(0)
        connection.end()
        client.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert order == list(range(300))

"""Messages: whole, in pieces, hostile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllmctl.errors import StoreError
from sllmctl.store.protocol import MAX_MESSAGE_BYTES, Decoder, close_fds, encode, receive


def test_a_message_may_come_in_any_pieces() -> None:
    raw = encode({"op": "hello", "name": "你好\n"}) + encode({"op": "status"})
    for size in range(1, len(raw) + 1):
        decoder = Decoder()
        messages = []
        for start in range(0, len(raw), size):
            messages += decoder.feed(raw[start : start + size])
        assert [message["op"] for message, _ in messages] == ["hello", "status"]
        assert messages[0][0]["name"] == "你好\n"


def test_descriptors_belong_to_the_message_that_counts_them() -> None:
    left, right = socket.socketpair()
    first, second = os.pipe()
    socket.send_fds(left, [encode({"op": "a"}) + encode({"op": "b", "fds": 2})], [first, second])
    data, fds = receive(right)
    (_, none), (_, two) = Decoder().feed(data, fds)
    assert none == []
    os.write(two[1], b"x")
    assert os.read(first, 1) == b"x"
    close_fds([*two, first, second])
    left.close()
    right.close()


@pytest.mark.parametrize(
    "line",
    [
        b"[]\n",
        b"nonsense\n",
        b'{"fds": 1}\n',
        b'{"fds": -1}\n',
        b'{"fds": true}\n',
        b'{"fds": "1"}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"x" * (MAX_MESSAGE_BYTES + 2),
    ],
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(StoreError):
        Decoder().feed(line)


def test_descriptors_that_no_message_takes_are_closed() -> None:
    reader, writer = os.pipe()
    decoder = Decoder()
    decoder.feed(b'{"op": "x"}\n', [reader, writer])
    decoder.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    with contextlib.suppress(StoreError):
        for message, _ in Decoder().feed(data):
            assert isinstance(message, dict)


def test_many_mutated_messages_are_read_or_refused() -> None:
    generator = random.Random(5)
    seeds = [
        encode({"op": "hello", "version": 1}),
        encode({"op": "attach", "label": "a/b"}),
        encode({"op": "shards", "names": ["m"], "fds": 0}),
        json.dumps({"op": "warm", "name": "x", "pin": True}).encode() + b"\n",
    ]
    for _ in range(20_000):
        raw = bytearray(generator.choice(seeds))
        for _ in range(generator.randrange(1, 6)):
            at = generator.randrange(len(raw))
            raw[at : at + generator.randrange(3)] = generator.randbytes(generator.randrange(4))
        try:
            Decoder().feed(bytes(raw))
        except StoreError:
            continue

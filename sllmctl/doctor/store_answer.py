"""What a store of sllmctl says at its socket, within two seconds and whatever it is."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from sllmctl import __version__
from sllmctl.errors import StoreError
from sllmctl.store.protocol import VERSION, Decoder, Message, close_fds, encode, receive

DEADLINE_S = 2.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: ``problem`` is "", "refused", "denied", "no socket", or a reason.

    Attributes:
        hello, status: The messages of these names; ``status`` is empty where it is refused.
    """

    problem: str = ""
    hello: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)


def ask_store(path: str, deadline_s: float = DEADLINE_S) -> Answer:
    """Say hello at a Unix socket, and ask for the status; never raises for what answers."""
    ends_s = time.monotonic() + deadline_s
    decoder = Decoder()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.settimeout(deadline_s)
            sock.connect(path)
            requests: list[Message] = [
                {"op": "hello", "version": VERSION, "sllmctl": __version__},
                {"op": "status"},
            ]
            sock.sendall(b"".join(map(encode, requests)))
            hello, status = _messages(sock, decoder, len(requests), ends_s)
        except (OSError, ValueError, StoreError) as exc:
            return Answer(_problem(exc))
        finally:
            decoder.close()
    if hello.get("event") != "hello":
        return Answer(str(hello.get("message", "it is no store of sllmctl"))[:200])
    return Answer("", hello, status if status.get("event") == "status" else {})


def _messages(sock: socket.socket, decoder: Decoder, count: int, ends_s: float) -> list[Message]:
    found: deque[Message] = deque()
    while len(found) < count:
        left_s = ends_s - time.monotonic()
        if left_s <= 0 or not select.select([sock], [], [], left_s)[0]:
            raise TimeoutError("it says nothing")
        data, fds = receive(sock)
        if not data and found:  # it refused the version, and hung up
            return [found[0], {}]
        if not data:
            raise ConnectionError("it has closed the connection")
        for message, own in decoder.feed(data, fds):
            close_fds(own)
            found.append(message)
    return [found.popleft() for _ in range(count)]


def _problem(exc: Exception) -> str:
    number = exc.errno if isinstance(exc, OSError) else None
    if number == errno.ECONNREFUSED:
        return "refused"
    if number in (errno.EACCES, errno.EPERM):
        return "denied"
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc) or type(exc).__name__

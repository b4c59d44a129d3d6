"""Talking to a store: with deadlines, and closed for good after the first thing that goes wrong."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from sllmctl import __version__
from sllmctl.errors import StoreError, StoreUnreachable
from sllmctl.native import PAGE_BYTES
from sllmctl.store.protocol import (
    MAX_FDS,
    VERSION,
    Decoder,
    Message,
    client_sockets,
    close_fds,
    encode,
    receive,
)

CONNECT_DEADLINE_S = 2.0
HELLO_DEADLINE_S = 10.0  # waits for nothing but the store's turn
ANSWER_DEADLINE_S = 60.0
_SLICE_MS = 200
_CROWDED_S = 0.005
_CROWDED_DEADLINE_S = 20.0  # less than the store waits for what follows


class StoreClient:
    """A connection to a store, and the lease that lives as long as it.

    The store's greeting is awaited with the first answer: a load sends its attach right behind.

    Attributes:
        segment_bytes: Of the store's segments; 0 until its first answer.
        watch: Called every 0.2 s of a wait, which it ends by raising.

    Raises:
        StoreUnreachable: Nobody listens at the socket.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._decoder = Decoder()
        self._waiting: deque[tuple[Message, list[int]]] = deque()
        self.segment_bytes = 0
        self.watch: Callable[[], None] | None = None
        self._sock = _connect(client_sockets(path))
        self.send({"op": "hello", "version": VERSION, "sllmctl": __version__})

    def ask(self, message: Message, deadline_s: float = ANSWER_DEADLINE_S) -> Message:
        """Send a request, and wait for its answer.

        Raises:
            StoreError: The store refuses, or breaks the connection.
        """
        self.send(message)
        answer, fds = self.receive(deadline_s)
        close_fds(fds)
        return answer

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a request. At most 250 descriptors.

        Raises:
            StoreError: The store has refused one before, and hung up.
            StoreUnreachable: It is gone.
        """
        line = encode({**message, "fds": len(fds)} if fds else message)
        try:
            sent = self._send_fds(line, fds) if fds else self._sock.send(line)
            if sent < len(line):  # nothing left to send must not notice that we were refused
                self._sock.sendall(line[sent:])
        except OSError as exc:
            if isinstance(exc, ConnectionError):  # it has hung up: what it said before is there
                with suppress(StoreUnreachable):
                    while True:
                        close_fds(self.receive()[1])
            self.close()
            raise StoreUnreachable(f"the store is gone: {exc.strerror or exc}") from exc

    def _send_fds(self, line: bytes, fds: Sequence[int]) -> int:
        """Send as soon as the kernel takes it: a user's descriptors on their way have a limit.

        It is ``RLIMIT_NOFILE``, which the ranks of an engine that load at once may reach together.
        """
        deadline = time.monotonic() + _CROWDED_DEADLINE_S
        while True:
            try:
                return socket.send_fds(self._sock, [line], fds)
            except OSError as exc:
                if exc.errno != errno.ETOOMANYREFS or time.monotonic() > deadline:
                    raise
                time.sleep(_CROWDED_S)
                if self.watch is not None:
                    self.watch()

    def send_shards(self, names: Sequence[str], fds: Sequence[int]) -> None:
        """Hand over open files, in as many messages as it takes."""
        for start in range(0, len(fds), MAX_FDS):
            batch = slice(start, start + MAX_FDS)
            self.send({"op": "shards", "names": list(names[batch])}, fds[batch])

    def receive(self, deadline_s: float = ANSWER_DEADLINE_S) -> tuple[Message, list[int]]:
        """The next message, and its descriptors, which are the caller's.

        Raises:
            StoreError: The store refuses a request, or is none of sllmctl.
            StoreUnreachable: It is gone, or says nothing for the deadline.
        """
        if not self.segment_bytes:
            hello, fds = self._receive(HELLO_DEADLINE_S)
            close_fds(fds)
            self.segment_bytes = _segment_bytes(hello)
        return self._receive(deadline_s)

    def _receive(self, deadline_s: float) -> tuple[Message, list[int]]:
        deadline = time.monotonic() + deadline_s
        poll = select.poll()  # select.select() takes no descriptor above 1023
        try:
            if not self._waiting:
                poll.register(self._sock, select.POLLIN)
            while not self._waiting:
                if time.monotonic() > deadline:
                    raise StoreUnreachable(
                        f"the store has said nothing for {deadline_s:.0f} s",
                        hint="its process may be stopped, or its machine overloaded",
                    )
                if poll.poll(_SLICE_MS):
                    data, fds = receive(self._sock)
                    if not data:
                        raise StoreUnreachable("the store has closed the connection")
                    self._waiting.extend(self._decoder.feed(data, fds))
                elif self.watch is not None:
                    self.watch()
        except (OSError, ValueError) as exc:
            self.close()
            if isinstance(exc, StoreUnreachable):
                raise
            reason = (exc.strerror if isinstance(exc, OSError) else None) or exc
            raise StoreUnreachable(f"the store is gone: {reason}") from exc
        message, fds = self._waiting.popleft()
        if message.get("event") == "error":
            close_fds(fds)
            hint = message.get("hint")
            raise StoreError(str(message.get("message")), hint=str(hint) if hint else None)
        return message, fds

    def interrupt(self) -> None:
        """End a wait of another thread, which then closes the connection and its descriptors."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection, and the lease with it."""
        self._sock.close()
        self._decoder.close()
        for _, fds in self._waiting:
            close_fds(fds)
        self._waiting.clear()

    def __del__(self) -> None:
        # As a lease it is closed by whoever lets go of the last tensor.
        if hasattr(self, "_sock"):
            self.close()

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _segment_bytes(hello: Message) -> int:
    nbytes = hello.get("segment_bytes")
    if type(nbytes) is not int or nbytes <= 0 or nbytes % PAGE_BYTES:
        raise StoreError(
            f"what answers is not a store of sllmctl: it has segments of {nbytes!r} bytes"
        )
    return nbytes


def _connect(paths: Sequence[Path]) -> socket.socket:
    reasons = []
    hint = "start one with `sllmctl serve`, or name its socket with SLLMCTL_SOCKET"
    for path in paths:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(CONNECT_DEADLINE_S)
        try:
            sock.connect(os.fspath(path))
        except OSError as exc:
            sock.close()
            reasons.append(f"`{path}`: {exc.strerror or exc}")
            if exc.errno == errno.EACCES:
                hint = "it serves its own user, and with `sllmctl serve --group` a group's members"
            continue
        sock.settimeout(ANSWER_DEADLINE_S)
        return sock
    raise StoreUnreachable(
        f"no store answers at {', '.join(reasons)}",
        hint=hint,
    )

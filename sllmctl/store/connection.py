"""One client's connection: bytes in, messages out. Knows no request."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from sllmctl.errors import SllmError, StoreError
from sllmctl.native import Segment
from sllmctl.store.protocol import Decoder, Message, close_fds, collect_fds, encode, receive

log = logging.getLogger(__name__)
MAX_QUEUED_BYTES = 8 << 20
HELLO_DEADLINE_S = 10.0
SEND_DEADLINE_S = 30.0
_TURN = 16
"""Messages of one client that are handled before others get their turn."""


class Connection:
    """A client's messages. Everything happens on the daemon's thread; nothing blocks.

    A client that is not greeted within 10 s, takes nothing for 30 s, or breaks the protocol, is
    dropped.

    Args:
        sock: Connected to the client.
        handle: Called with each message and its descriptors, which are its own then.
        on_end: Called once, when the client is gone or dropped.

    Attributes:
        pid: Of the client.
        uid: Its user.
        ended: It is gone.
        failed: It was dropped for what it did, or for what went wrong here.
    """

    def __init__(
        self,
        sock: socket.socket,
        handle: Callable[[Message, list[int]], None],
        on_end: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._on_end = on_end
        self.pid, self.uid, _ = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        )
        self.ended = self.failed = False
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()
        self._in: deque[tuple[Message, list[int]]] = deque()
        self._out: deque[tuple[bytes, tuple[Segment, ...], list[int]]] = deque()
        self._queued_bytes = 0
        self._greeted = False
        self._paused = False
        self._stalled = False  # something waits for the client, and the deadline runs
        self._deadline = self._loop.call_later(HELLO_DEADLINE_S, self.end, "it said no hello")
        sock.setblocking(False)
        self._loop.add_reader(sock, self._on_readable)

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come, or to be sent."""
        return self._paused or bool(self._in or self._out)

    def greet(self, message: Message) -> None:
        """Answer a hello: the client has said it in time."""
        self._deadline.cancel()
        self._greeted = True
        self.send(message)

    def end(self, reason: str | None = None) -> None:
        """Drop the client."""
        if self.ended:
            return
        self.ended = True
        if reason is not None:
            log.info("client pid %d dropped: %s", self.pid, reason)
        self._deadline.cancel()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._decoder.close()
        for _, fds in self._in:
            close_fds(fds)
        for _, _, fds in self._out:
            close_fds(fds)
        self._on_end()

    def send(
        self, message: Message, segments: Sequence[Segment] = (), files: Sequence[int] = ()
    ) -> None:
        """Queue a message; readers of `segments`, or copies of `files`, travel with it."""
        if self.ended:
            return
        count = len(segments) + len(files)
        line = encode({**message, "fds": count} if count else message)
        self._out.append((line, tuple(segments), collect_fds(os.dup, files)))
        self._queued_bytes += len(line)
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self.end("it does not take its messages")
            return
        self._on_writable()

    def require_within(self, seconds: float, what: str) -> asyncio.TimerHandle:
        """Drop the client after so long, unless the handle is cancelled before."""
        return self._loop.call_later(seconds, self.end, f"{what} within {seconds:.0f} s")

    def refuse(self, exc: SllmError) -> None:
        """Answer a request with an error."""
        self.send({"event": "error", "kind": exc.kind, "message": str(exc), "hint": exc.hint})

    def pause(self) -> None:
        """Let what the client says wait: it cannot be answered yet."""
        self._paused = True
        self._loop.remove_reader(self._sock)

    def resume(self) -> None:
        """Go on with what the client says."""
        self._paused = False
        self._handle_some()

    def fail(self, exc: Exception) -> None:
        """Drop the client for what it did, or for what went wrong here."""
        self.failed = True
        if isinstance(exc, SllmError):
            self.refuse(exc)
            self.end(str(exc))
        elif isinstance(exc, OSError):
            self.end(exc.strerror)
        else:
            log.error("client pid %d dropped: a bug", self.pid, exc_info=exc)
            self.end()

    def _on_readable(self) -> None:
        try:
            data, fds = receive(self._sock)
            if not data:
                close_fds(fds)
                self.end()
                return
            self._in.extend(self._decoder.feed(data, fds))
        except (BlockingIOError, InterruptedError):
            return
        except (StoreError, OSError) as exc:
            self.fail(exc)
            return
        self._handle_some()

    def _handle_some(self) -> None:
        """Answer what has come, and read on when all of it is answered."""
        try:
            for _ in range(_TURN):
                if not self._in or self.ended or self._paused:
                    break
                self._handle(*self._in.popleft())
        except Exception as exc:
            self.fail(exc)
        if self.ended or self._paused:
            return
        if self._in:
            self._loop.remove_reader(self._sock)
            self._loop.call_soon(self._handle_some)
        else:
            self._loop.add_reader(self._sock, self._on_readable)

    def _on_writable(self) -> None:
        taken = 0
        try:
            while self._out:
                line, segments, files = self._out[0]
                sent = self._send_some(line, segments, files)
                taken += sent
                self._queued_bytes -= sent
                if sent < len(line):
                    self._out[0] = line[sent:], (), []
                else:
                    self._out.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except (OSError, SllmError) as exc:
            self.end(str(exc))
            return
        if self.ended or not self._greeted:
            return
        if taken or not self._out:
            self._deadline.cancel()
            self._stalled = False
        if not self._out:
            self._loop.remove_writer(self._sock)
        elif not self._stalled:
            self._stalled = True
            self._loop.add_writer(self._sock, self._on_writable)
            self._deadline = self._loop.call_later(
                SEND_DEADLINE_S, self.end, "it does not read what is sent to it"
            )

    def _send_some(self, line: bytes, segments: Sequence[Segment], files: list[int]) -> int:
        # Readers are opened when they are sent: a client that takes nothing holds no segment.
        fds = collect_fds(Segment.reader, segments)
        try:
            both = [*fds, *files]
            sent = socket.send_fds(self._sock, [line], both) if both else self._sock.send(line)
        finally:
            close_fds(fds)
        close_fds(files)
        return sent

"""Messages between store and client: one JSON object a line over a Unix socket, with descriptors.

A message that brings descriptors says so in ``fds``; they belong to it in the order in which they
were sent. Unknown fields are ignored, and an unknown operation or version is refused politely.
"""

from __future__ import annotations

import array
import json
import os
import resource
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sllmctl.errors import ConfigError, StoreError

VERSION = 1
MAX_MESSAGE_BYTES = 1 << 20
MAX_FDS = 250
"""Descriptors of one message: the kernel takes 253."""
MAX_SHARDS = 4096
MAX_NAME = 4096
"""Characters of a model's name, or of a client's label."""
MAX_PARTS = 65536
"""Of one model: a list of them all fits into a message."""
FILES_CHANGED = "the files changed while they were read"
"""The `reason` of a model whose parts may be of two versions of its files."""
SOCKET_VARIABLE = "SLLMCTL_SOCKET"
SYSTEM_SOCKET = Path("/run/sllmctl/store.sock")
_RECEIVE_BYTES = 1 << 16

Message = dict[str, Any]
T = TypeVar("T")


def user_socket() -> Path | None:
    """The socket below ``$XDG_RUNTIME_DIR``, or None without that variable."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "sllmctl" / "store.sock" if runtime else None


def server_socket(explicit: Path | None) -> Path:
    """Where a server listens: as said, else for root below ``/run``, for others below XDG's.

    Raises:
        ConfigError: A user without ``$XDG_RUNTIME_DIR`` has to say.
    """
    said = explicit or os.environ.get(SOCKET_VARIABLE)
    if said:
        return Path(said)
    path = SYSTEM_SOCKET if os.geteuid() == 0 else user_socket()
    if path is None:
        raise ConfigError(
            "there is no default place for the socket: XDG_RUNTIME_DIR is not set",
            hint="give --socket PATH, and set SLLMCTL_SOCKET to it for clients",
        )
    return path


def client_sockets(explicit: Path | None = None) -> list[Path]:
    """Where a client looks, in order: what is said alone, else XDG's and ``/run``."""
    said = explicit or os.environ.get(SOCKET_VARIABLE)
    if said:
        return [Path(said)]
    mine = user_socket()
    return [*([mine] if mine else []), SYSTEM_SOCKET]


def encode(message: Message) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


class Decoder:
    """Bytes and descriptors as they arrive, messages as they are complete.

    It owns descriptors until a message takes them; `close` closes the rest.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._fds: deque[int] = deque()

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[tuple[Message, list[int]]]:
        """Take what was received; return the messages that are complete now.

        Raises:
            StoreError: A line is too long or no message, or descriptors do not add up.
        """
        self._bytes += data
        self._fds.extend(fds)
        messages: list[tuple[Message, list[int]]] = []
        try:
            while (end := self._bytes.find(b"\n")) >= 0:
                line = bytes(self._bytes[:end])
                del self._bytes[: end + 1]
                messages.append(self._message(line))
            if len(self._bytes) > MAX_MESSAGE_BYTES:
                raise StoreError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
            if len(self._fds) > MAX_SHARDS:
                raise StoreError(f"more than {MAX_SHARDS} descriptors without a message")
        except StoreError:
            for _, own in messages:
                close_fds(own)
            raise
        return messages

    def _message(self, line: bytes) -> tuple[Message, list[int]]:
        if len(line) > MAX_MESSAGE_BYTES:
            raise StoreError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        try:
            message = json.loads(line)
            if b"\\" in line:  # half of a surrogate pair is no text: no path and no log takes it
                json.dumps(message, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as exc:
            raise StoreError(f"a line that is no JSON: {exc}") from exc
        if not isinstance(message, dict):
            raise StoreError("a line that is no JSON object")
        count = message.get("fds", 0)
        if type(count) is not int or not 0 <= count <= min(MAX_FDS, len(self._fds)):
            raise StoreError(f"a message with {len(self._fds)} descriptors says {count!r}")
        return message, [self._fds.popleft() for _ in range(count)]

    def close(self) -> None:
        """Close descriptors that no message took."""
        close_fds(self._fds)
        self._fds.clear()


def allow_descriptors(more: int | None = None) -> None:
    """Raise this process's soft limit of open files, so far as the hard one lets it.

    Args:
        more: How many it wants besides those that it has; None for as many as there are.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if more is None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return
    wanted = sum(1 for _ in Path("/proc/self/fd").iterdir()) + more
    if soft not in (resource.RLIM_INFINITY, hard) and wanted > soft:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def close_fds(fds: Sequence[int] | deque[int]) -> None:
    """Close every descriptor."""
    for fd in fds:
        os.close(fd)


def collect_fds(make: Callable[[T], int], sources: Iterable[T]) -> list[int]:
    """A descriptor of each, or of none when one cannot be had."""
    fds: list[int] = []
    try:
        for source in sources:
            fds.append(make(source))
    except BaseException:
        close_fds(fds)
        raise
    return fds


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Read what is there, with its descriptors, close-on-exec.

    Raises:
        StoreError: More descriptors came than fit.
        OSError: The socket's own failures.
    """
    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(_RECEIVE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            fds.extend(numbers)
    if flags & socket.MSG_CTRUNC:
        close_fds(fds)
        raise StoreError("descriptors were lost on their way: too many at once")
    return data, fds

"""One client's connection: bytes in, messages out, and the requests that it makes."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Sequence

from sllmctl import __version__
from sllmctl.errors import SllmError, StoreError
from sllmctl.native import Segment
from sllmctl.store.filler import identify
from sllmctl.store.protocol import (
    MAX_FDS,
    MAX_SHARDS,
    VERSION,
    Decoder,
    Message,
    close_fds,
    encode,
    receive,
)
from sllmctl.store.residency import Lease, Piece, StoredModel
from sllmctl.store.service import Service

log = logging.getLogger(__name__)
MAX_QUEUED_BYTES = 8 << 20
HELLO_DEADLINE_S = 10.0
SEND_DEADLINE_S = 30.0


class Connection:
    """A client. Everything happens on the daemon's thread; nothing blocks.

    A client that says no hello within 10 s, takes nothing for 30 s, or breaks the protocol, is
    dropped; its lease ends with the connection.
    """

    def __init__(
        self, service: Service, sock: socket.socket, on_end: Callable[[Connection], None]
    ) -> None:
        self._service = service
        self._keeper = service.keeper
        self._on_end = on_end
        self.pid, self.uid, _ = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        )
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()
        self._out: deque[tuple[bytes, tuple[Segment, ...]]] = deque()
        self._queued_bytes = 0
        self._shards: list[tuple[str, int]] = []
        self._fds: list[int] = []
        self._lease: Lease | None = None
        self._greeted = False
        self._ended = False
        self._deadline = self._loop.call_later(HELLO_DEADLINE_S, self.end, "it said no hello")
        sock.setblocking(False)
        self._loop.add_reader(sock, self._on_readable)

    def end(self, reason: str | None = None) -> None:
        """Drop the client: its lease ends."""
        if self._ended:
            return
        self._ended = True
        if reason is not None:
            log.info("client pid %d dropped: %s", self.pid, reason)
        self._deadline.cancel()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._decoder.close()
        close_fds(self._fds)
        self._fds = []
        if self._lease is not None:
            self._keeper.release(self._lease)
        self._on_end(self)

    def send(self, message: Message, segments: Sequence[Segment] = ()) -> None:
        """Queue a message; readers of `segments` travel with it."""
        if self._ended:
            return
        line = encode({**message, "fds": len(segments)} if segments else message)
        self._out.append((line, tuple(segments)))
        self._queued_bytes += len(line)
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self.end("it does not take its messages")
            return
        self._on_writable()

    def _on_readable(self) -> None:
        messages: deque[tuple[Message, list[int]]] = deque()
        try:
            data, fds = receive(self._sock)
            if not data:
                close_fds(fds)
                self.end()
                return
            messages.extend(self._decoder.feed(data, fds))
            while messages and not self._ended:
                self._handle(*messages.popleft())
        except (BlockingIOError, InterruptedError):
            return
        except SllmError as exc:
            self._refuse(exc)
            self.end(str(exc))
        except OSError as exc:
            self.end(exc.strerror)
        except Exception:
            log.exception("client pid %d dropped: a bug", self.pid)
            self.end()
        finally:
            for _, own in messages:  # after one that ended the connection
                close_fds(own)

    def _on_writable(self) -> None:
        try:
            while self._out:
                line, segments = self._out[0]
                sent = self._send_some(line, segments)
                self._queued_bytes -= sent
                if sent < len(line):
                    self._out[0] = line[sent:], ()
                else:
                    self._out.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as exc:
            self.end(exc.strerror)
            return
        if self._ended or not self._greeted:
            return
        self._deadline.cancel()
        if self._out:
            self._loop.add_writer(self._sock, self._on_writable)
            self._deadline = self._loop.call_later(SEND_DEADLINE_S, self.end, "it takes nothing")
        else:
            self._loop.remove_writer(self._sock)

    def _send_some(self, line: bytes, segments: Sequence[Segment]) -> int:
        # Readers are opened when they are sent: a client that takes nothing holds no segment.
        fds = [segment.reader() for segment in segments]
        try:
            return socket.send_fds(self._sock, [line], fds) if fds else self._sock.send(line)
        finally:
            close_fds(fds)

    def _refuse(self, exc: SllmError) -> None:
        self._keeper.counters.errors += 1
        self.send({"event": "error", "kind": exc.kind, "message": str(exc), "hint": exc.hint})

    def _handle(self, message: Message, fds: list[int]) -> None:
        """Answer a request. What it refuses is answered too, and the connection goes on."""
        name = message.get("op")
        if not isinstance(name, str):
            close_fds(fds)
            raise StoreError("a message without an operation")
        if name != "shards":
            close_fds(fds)
        if not self._greeted:
            self._hello(name, message, fds)
            return
        requests: dict[object, Callable[[Message], None]] = {
            "attach": self._attach,
            "status": lambda _: self.send(self._service.status()),
            "warm": self._warm,
            "evict": self._evict,
            "detach": self._detach,
        }
        if name == "shards":
            self._take_shards(message, fds)
        elif name in requests:
            try:
                requests[name](message)
            except SllmError as exc:
                self._refuse(exc)
        else:
            self._refuse(StoreError(f"unknown operation {name!r}", hint="use the same version"))

    def _hello(self, name: object, message: Message, fds: Sequence[int]) -> None:
        version = message.get("version")
        if name != "hello" or version != VERSION:
            if name == "shards":
                close_fds(fds)
            raise StoreError(
                f"this store speaks version {VERSION} of the protocol, not {version!r}",
                hint="use the same version of sllmctl for store and client",
            )
        self._deadline.cancel()
        self._greeted = True
        self.send(
            {
                "event": "hello",
                "version": VERSION,
                "sllmctl": __version__,
                "pid": os.getpid(),
                "segment_bytes": self._keeper.pool.segment_bytes,
            }
        )

    def _take_shards(self, message: Message, fds: list[int]) -> None:
        names = message.get("names")
        self._fds += fds
        if (
            not isinstance(names, list)
            or len(names) != len(fds)
            or not all(isinstance(name, str) and len(name) <= 255 for name in names)
            or len(self._fds) > MAX_SHARDS
            or self._lease is not None
        ):
            raise StoreError("a list of shards that does not match its descriptors")
        for name, fd in zip(names, fds, strict=True):
            # The store may read more than its client: what the client cannot read, it must not
            # have read to it. An O_PATH descriptor, say, takes no right to the file at all.
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
                raise StoreError(f"`{name}` is not open for reading")
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise StoreError(f"`{name}` is not a regular file")
            self._shards.append((name, status.st_size))

    def _attach(self, message: Message) -> None:
        label = message.get("label")
        if not isinstance(label, str) or len(label) > 4096:
            raise StoreError("an attach without a label")
        if self._lease is not None or not self._fds:
            raise StoreError("one attach a connection, after its shards")
        fds, self._fds = self._fds, []
        try:
            self._use(label, self._shards, fds, trusted_name=False)
        finally:
            close_fds(fds)

    def _warm(self, message: Message) -> None:
        self._service.require_trusted(self.uid)
        name = message.get("name")
        if not isinstance(name, str) or self._lease is not None:
            raise StoreError("one warm a connection, of a model's name")
        shards, fds = self._service.open_model(name)
        try:
            self._use(name, shards, fds, trusted_name=True, hand_out=False)
        finally:
            close_fds(fds)
        if message.get("pin") is True and self._lease is not None:
            self._lease.model.pinned = True

    def _use(
        self,
        name: str,
        shards: Sequence[tuple[str, int]],
        fds: Sequence[int],
        *,
        trusted_name: bool,
        hand_out: bool = True,
    ) -> None:
        def arrived(pieces: list[Piece]) -> None:
            self._send_pieces(model, pieces, hand_out=hand_out)

        def settled(reason: str | None) -> None:
            missing = [piece for piece in model.pieces() if piece not in model.warm]
            self.send(
                {
                    "event": "settled",
                    "missing": missing,
                    "warm_bytes": model.warm_bytes,
                    "reason": reason,
                }
            )

        lease = self._lease = self._keeper.attach(
            name,
            shards,
            fds,
            identify(fds),
            pid=self.pid,
            arrived=arrived,
            settled=settled,
            trusted_name=trusted_name,
        )
        model = lease.model
        self.send(
            {
                "event": "attached",
                "name": model.name,
                "bytes": model.nbytes,
                "warm_bytes": model.warm_bytes,
                "coming": sorted(model.coming),
            }
        )
        self._send_pieces(model, sorted(model.warm), hand_out=hand_out)
        if lease not in model.waiting:
            settled(None)

    def _send_pieces(self, model: StoredModel, pieces: list[Piece], *, hand_out: bool) -> None:
        for start in range(0, len(pieces), MAX_FDS):
            batch = pieces[start : start + MAX_FDS]
            segments = [model.warm[piece] for piece in batch] if hand_out else []
            self.send({"event": "ready", "pieces": batch, "warm_bytes": model.warm_bytes}, segments)

    def _detach(self, _: Message) -> None:
        if self._lease is not None:
            self._keeper.release(self._lease)
            self._lease = None
        self._shards = []
        self.send({"event": "detached"})

    def _evict(self, message: Message) -> None:
        self._service.require_trusted(self.uid)
        name = message.get("name")
        models = [model for model in self._keeper.models.values() if name in (None, model.name)]
        if name is not None and not models:
            raise StoreError(f"the store holds no `{name}`", hint="see `sllmctl status`")
        freed, kept = 0, []
        for model in models:
            if name is None and model.pinned:
                kept.append(f"`{model.name}` is pinned: name it to evict it")
                continue
            try:
                held = model.warm_bytes
                self._keeper.evict(model)
                freed += held
            except StoreError as exc:
                if name is not None:
                    raise
                kept.append(str(exc))
        self.send({"event": "evicted", "bytes": freed, "kept": kept})

"""What a client asks for, and what it gets."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from sllmctl import __version__
from sllmctl.errors import CheckpointNotFound, SllmError, StoreError
from sllmctl.store.connection import Connection
from sllmctl.store.files import ModelFiles, open_named, take_files
from sllmctl.store.protocol import MAX_FDS, MAX_NAME, MAX_SHARDS, VERSION, Message, close_fds
from sllmctl.store.residency import Lease, Piece, StoredModel
from sllmctl.store.service import Service

log = logging.getLogger(__name__)
ATTACH_DEADLINE_S = 30.0


class Session:
    """A client's requests; its lease ends with the connection.

    Args:
        service: Of the store.
        sock: Connected to the client.
        on_end: Called when the client is gone.
    """

    def __init__(
        self, service: Service, sock: socket.socket, on_end: Callable[[Session], None]
    ) -> None:
        self._service = service
        self._keeper = service.keeper
        self._on_end = on_end
        self._greeted = False
        self._names: list[str] = []
        self._fds: list[int] = []
        self._attach_by: asyncio.TimerHandle | None = None
        self._lease: Lease | None = None
        self._connection = Connection(sock, self._handle, self._ended)

    def end(self) -> None:
        """Drop the client."""
        self._connection.end()

    @property
    def busy(self) -> bool:
        """Whether the client waits: for an answer, or for the rest of a model."""
        lease = self._lease
        return self._connection.busy or (lease is not None and lease in lease.model.waiting)

    def _ended(self) -> None:
        self._await_attach(None)
        close_fds(self._fds)
        self._fds = []
        if self._lease is not None:
            self._keeper.release(self._lease)
        self._keeper.counters.errors += self._connection.failed
        self._on_end(self)

    def _await_attach(self, deadline: asyncio.TimerHandle | None) -> None:
        if self._attach_by is not None:
            self._attach_by.cancel()
        self._attach_by = deadline

    def _refuse(self, exc: SllmError) -> None:
        self._keeper.counters.errors += 1
        self._connection.refuse(exc)

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
            "status": lambda _: self._connection.send(self._service.status()),
            "warm": lambda message: self._use_name(message, hand_out=False),
            "evict": self._evict,
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
        self._greeted = True
        log.info("client pid %d of user %d", self._connection.pid, self._connection.uid)
        self._connection.greet(
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
        self._names += names
        self._await_attach(
            self._connection.require_within(
                ATTACH_DEADLINE_S, "it sent shards, and no more, nor an attach"
            )
        )

    def _attach(self, message: Message) -> None:
        if "name" in message:
            self._use_name(message, hand_out=True)
            return
        label = message.get("label")
        if not isinstance(label, str) or len(label) > MAX_NAME:
            raise StoreError("an attach without a label")
        if self._lease is not None or not self._fds or len(self._fds) != len(self._names):
            raise StoreError("one attach a connection, after its shards")
        self._await_attach(None)
        names, fds = self._names, self._fds
        self._names, self._fds = [], []
        storage = self._service.settings.storage
        self._look_up(lambda: take_files(storage, label, names, fds), self._use, fds)

    def _use_name(self, message: Message, *, hand_out: bool) -> None:
        self._service.require_trusted(self._connection.uid)
        name = message.get("name")
        if (
            not isinstance(name, str)
            or len(name) > MAX_NAME
            or self._lease is not None
            or self._fds
        ):
            raise StoreError("one attach or warm a connection, of a model's name")
        storage = self._service.settings.storage

        def use(files: ModelFiles | CheckpointNotFound) -> None:
            self._use(files, name=name, hand_out=hand_out)
            if message.get("pin") is True and self._lease is not None:
                self._lease.model.pinned = True

        self._look_up(lambda: open_named(storage, name), use)

    def _look_up(
        self,
        work: Callable[[], ModelFiles],
        use: Callable[[ModelFiles | CheckpointNotFound], None],
        fds: Sequence[int] = (),
    ) -> None:
        """Find a model's files without blocking the loop; the client's next messages wait."""

        def done(found: Future[ModelFiles]) -> None:
            files: ModelFiles | CheckpointNotFound | None = None
            try:
                try:
                    files = found.result()
                except CheckpointNotFound as exc:
                    files = exc
                if not self._connection.ended:
                    use(files)
            except SllmError as exc:
                self._refuse(exc)
            except Exception as exc:
                self._connection.fail(exc)
            finally:
                if isinstance(files, ModelFiles):
                    files.close()
            self._connection.resume()

        try:
            self._service.lookups.start(work, done, ModelFiles.close)
        except StoreError:
            close_fds(fds)
            raise
        self._connection.pause()

    def _use(
        self,
        files: ModelFiles | CheckpointNotFound,
        *,
        name: str | None = None,
        hand_out: bool = True,
    ) -> None:
        """Begin a lease: on files, or on what is warm of a named model whose files are gone."""

        def arrived(pieces: list[Piece]) -> None:
            self._send_pieces(model, pieces, hand_out=hand_out)

        def settled(reason: str | None) -> None:
            self._keeper.counters.load_seconds.add(time.monotonic() - lease.since_s)
            self._connection.send(
                {
                    "event": "settled",
                    "missing": [piece for piece in model.pieces() if piece not in model.warm],
                    "warm_bytes": model.warm_bytes,
                    "disk_bytes": model.disk_bytes,
                    "cache_bytes": model.cache_bytes,
                    "reason": reason,
                }
            )

        if isinstance(files, ModelFiles):
            lease = self._keeper.attach(
                files, pid=self._connection.pid, arrived=arrived, settled=settled
            )
        else:
            held = self._keeper.find(name) if name is not None else None
            if held is None:
                raise StoreError(str(files), hint=files.hint) from files
            lease = self._keeper.lease(
                held, pid=self._connection.pid, arrived=arrived, settled=settled
            )
        model, self._lease = lease.model, lease
        self._connection.send(
            {
                "event": "attached",
                "name": model.name,
                "bytes": model.nbytes,
                "warm_bytes": model.warm_bytes,
                "coming": sorted(model.coming),
                "shards": len(model.shards),
            }
        )
        if name is not None and hand_out:
            self._send_files(model, files.fds if isinstance(files, ModelFiles) else ())
        if model.warm:
            self._send_pieces(model, sorted(model.warm), hand_out=hand_out)
        if lease not in model.waiting:
            settled(None)

    def _send_files(self, model: StoredModel, fds: Sequence[int]) -> None:
        for start in range(0, len(model.shards), MAX_FDS):
            batch = slice(start, start + MAX_FDS)
            names, sizes = zip(*model.shards[batch], strict=True)
            self._connection.send(
                {"event": "files", "names": names, "sizes": sizes}, files=fds[batch]
            )

    def _send_pieces(self, model: StoredModel, pieces: list[Piece], *, hand_out: bool) -> None:
        for start in range(0, len(pieces) or 1, MAX_FDS):
            batch = pieces[start : start + MAX_FDS]
            segments = [model.warm[piece] for piece in batch] if hand_out else []
            if not self._service.own(self._connection.uid):
                self._keeper.pool.seen_by_others(segments)
            self._connection.send(
                {"event": "ready", "pieces": batch, "warm_bytes": model.warm_bytes}, segments
            )

    def _evict(self, message: Message) -> None:
        self._service.require_trusted(self._connection.uid)
        name = message.get("name")
        if isinstance(name, str) and len(name) > MAX_NAME:
            raise StoreError(f"a name of more than {MAX_NAME} characters")
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
        self._connection.send({"event": "evicted", "bytes": freed, "kept": kept})

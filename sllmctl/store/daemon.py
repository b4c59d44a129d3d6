"""`sllmctl serve`: the event loop around the keeper."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.errors import CheckpointError, ConfigError, StoreError
from sllmctl.store.connection import Connection
from sllmctl.store.keeper import Keeper
from sllmctl.store.pool import Pool
from sllmctl.store.protocol import MAX_SHARDS, Message, close_fds

log = logging.getLogger(__name__)
_REAP_EVERY_S = 0.5
_BACKLOG = 1024
PAGE_BYTES = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to serve.

    Attributes:
        storage: Where names are looked up.
        socket_path: Where to listen.
        pool_bytes: Budget of memory.
        segment_bytes: Size of a segment.
        group: Members of this group may use the store, too.
        preload: Names of models to warm at the start.
        threads: Reader threads of one fill; 0 for the library's choice.
    """

    storage: Path
    socket_path: Path
    pool_bytes: int
    segment_bytes: int
    group: int | None = None
    preload: Sequence[str] = ()
    threads: int = 0


class Daemon:
    """Serves one pool at one socket until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.connections: set[Connection] = set()
        self.started_s = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._stop = threading.Event()
        self.keeper = Keeper(
            Pool(settings.pool_bytes, settings.segment_bytes), self._call_soon, settings.threads
        )

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; ``ready`` is called when clients can come.

        Raises:
            StoreError: Another store serves this socket, or it cannot be made.
            ConfigError: A model to preload is not there.
        """
        asyncio.set_event_loop(self._loop)
        _raise_descriptor_limit()
        listener = listen(self.settings.socket_path, self.settings.group)
        prefault = threading.Thread(
            target=self.keeper.pool.prefault, args=(self._stop,), name="sllm-prefault", daemon=True
        )
        try:
            self._loop.add_reader(listener, self._accept, listener)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._loop.stop)
            self._loop.call_later(_REAP_EVERY_S, self._reap)
            for name in self.settings.preload:
                self._preload(name)
            prefault.start()
            ready()
            self._loop.run_forever()
        finally:
            self._stop.set()
            listener.close()
            with suppress(OSError):
                self.settings.socket_path.unlink()
            for connection in list(self.connections):
                self._loop.call_soon(connection.end)
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()
            self.keeper.close()
            self._loop.close()

    def status(self) -> Message:
        """The document that `sllmctl status --json` prints."""
        keeper, pool = self.keeper, self.keeper.pool
        now = time.monotonic()
        models = list(keeper.models.values())
        held = [model.warm_bytes for model in models]
        in_use = sum(len(model.warm) + len(model.coming) for model in models)
        leases = [connection.document() for connection in self.connections]
        return {
            "event": "status",
            "schema": "sllmctl.status/1",
            "pid": os.getpid(),
            "uptime_s": now - self.started_s,
            "socket": str(self.settings.socket_path),
            "pool": {
                "bytes": pool.bytes,
                "used_bytes": in_use * pool.segment_bytes,
                "pinned_bytes": sum(len(m.warm) for m in models if m.pinned) * pool.segment_bytes,
                "leased_bytes": sum(len(m.warm) for m in models if m.leases) * pool.segment_bytes,
                "orphaned_bytes": pool.orphaned_bytes,
                "segment_bytes": pool.segment_bytes,
                "page_bytes": PAGE_BYTES,
                "locked": pool.locked,
                "prefaulted_bytes": pool.prefaulted_bytes,
            },
            "models": [
                {
                    "name": model.name,
                    "bytes": model.nbytes,
                    "warm_bytes": warm_bytes,
                    "state": model.state,
                    "pinned": model.pinned,
                    "leases": len(model.leases),
                    "last_used_s": now - model.last_used_s,
                }
                for model, warm_bytes in zip(models, held, strict=True)
            ],
            "leases": [lease for lease in leases if lease is not None],
            "counters": {
                "loads": keeper.counters.loads,
                "bytes_disk": keeper.counters.bytes_disk,
                "bytes_warm": keeper.counters.bytes_warm,
                "evictions": keeper.counters.evictions,
                "errors": keeper.counters.errors,
            },
        }

    def require_trusted(self, connection: Connection) -> None:
        """Names, and what others have warm, are the daemon's own user's business, and root's.

        Raises:
            StoreError: The client is another user, and not let in by ``--group``.
        """
        if connection.uid in (os.geteuid(), 0) or self.settings.group is not None:
            return
        raise StoreError(
            f"user {connection.uid} may attach files, and not use names",
            hint="run the command as the user who runs the store",
        )

    def open_model(self, name: str) -> tuple[list[tuple[str, int]], list[int]]:
        """Open the shards of a model below the storage path; the caller closes them.

        Raises:
            StoreError: There is none, or the name leads out of the storage path.
        """
        root = Path(os.path.realpath(self.settings.storage))
        path = Path(os.path.realpath(root / name)) if "\0" not in name else root
        if not name or Path(name).is_absolute() or path == root or root not in path.parents:
            raise StoreError(f"`{name}` is no name of a model below `{self.settings.storage}`")
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as exc:
            raise StoreError(str(exc), hint=exc.hint) from exc
        shards, fds = [], []
        try:
            for shard in checkpoint.shards[:MAX_SHARDS]:
                real = Path(os.path.realpath(shard.path))
                if root not in real.parents:
                    raise StoreError(f"`{shard.path}` leads out of `{self.settings.storage}`")
                fds.append(os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
                shards.append((shard.path.name, os.fstat(fds[-1]).st_size))
        except OSError as exc:
            close_fds(fds)
            raise StoreError(f"cannot open `{exc.filename}`: {exc.strerror}") from exc
        except BaseException:
            close_fds(fds)
            raise
        return shards, fds

    def _preload(self, name: str) -> None:
        from sllmctl.store.filler import identify

        try:
            shards, fds = self.open_model(name)
        except StoreError as exc:
            raise ConfigError(f"cannot preload `{name}`: {exc}", hint=exc.hint) from exc

        def settled(_: str | None) -> None:
            self.keeper.release(lease)

        try:
            lease = self.keeper.attach(
                name,
                shards,
                fds,
                identify(fds),
                pid=os.getpid(),
                arrived=lambda _: None,
                settled=settled,
                trusted_name=True,
            )
            if not lease.model.coming:
                settled(None)
        finally:
            close_fds(fds)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                log.warning("no descriptor left for another client: raise `ulimit -n`")
            return
        self.connections.add(Connection(self, sock))

    def _reap(self) -> None:
        self.keeper.pool.reap()
        self._loop.call_later(_REAP_EVERY_S, self._reap)

    def _call_soon(self, function: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function)


def listen(path: Path, group: int | None) -> socket.socket:
    """Listen at a path; a socket that nobody serves any more is replaced.

    Raises:
        StoreError: Somebody serves it, or it cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o755 if group is not None else 0o700, parents=True, exist_ok=True)
        if path.is_socket():
            _replace_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(mask)
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o660)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as exc:
        raise StoreError(
            f"cannot listen at `{path}`: {exc.strerror or exc}",
            hint="give another --socket, at most 107 bytes long, in a directory of yours",
        ) from exc
    return sock


def _raise_descriptor_limit() -> None:
    """A segment takes two descriptors, a client one, a fill one a shard: take all there are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _replace_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except FileNotFoundError:
            return
    raise StoreError(
        f"a store serves `{path}` already", hint="`sllmctl status` shows it; or give --socket"
    )

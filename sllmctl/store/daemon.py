"""`sllmctl serve`: the event loop around the keeper."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from sllmctl.errors import ConfigError, StoreError
from sllmctl.store.connection import Connection
from sllmctl.store.filler import identify
from sllmctl.store.keeper import Keeper
from sllmctl.store.pool import Pool
from sllmctl.store.protocol import Message, close_fds
from sllmctl.store.service import Service, Settings

log = logging.getLogger(__name__)
_REAP_EVERY_S = 0.5
_BACKLOG = 1024
_ACCEPT_PAUSE_S = 1.0
_ANSWER_S = 5.0


class Daemon:
    """Serves one pool at one socket until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._connections: set[Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = threading.Event()
        self.keeper = Keeper(
            Pool(settings.pool_bytes, settings.segment_bytes), self._call_soon, settings.threads
        )
        self.service = Service(settings, self.keeper)

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; ``ready`` is called when clients can come.

        Raises:
            StoreError: Another store serves this socket, or it cannot be made.
            ConfigError: A model to preload is not there.
        """
        asyncio.set_event_loop(self._loop)
        _raise_descriptor_limit()
        lock = lock_socket(self.settings.socket_path)
        listener = listen(self.settings.socket_path, self.settings.group)
        bound = self.settings.socket_path.stat().st_ino
        prefault = threading.Thread(
            target=self.keeper.pool.prefault, args=(self._stop,), name="sllm-prefault", daemon=True
        )
        metrics = None
        try:
            if self.settings.metrics is not None:
                from sllmctl.store.metrics import serve_metrics

                metrics = serve_metrics(self.settings.metrics, self._ask)
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
            if metrics is not None:
                metrics.shutdown()
                metrics.server_close()
            listener.close()
            with suppress(OSError):
                if self.settings.socket_path.stat().st_ino == bound:
                    self.settings.socket_path.unlink()
            for connection in list(self._connections):
                self._loop.call_soon(connection.end)
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()
            self.keeper.close()
            self._loop.close()
            os.close(lock)

    def _ask(self) -> Message:
        """The status, for another thread."""
        answer: Future[Message] = Future()
        self._call_soon(lambda: answer.set_result(self.service.status()))
        return answer.result(_ANSWER_S)

    def _preload(self, name: str) -> None:
        try:
            shards, fds = self.service.open_model(name)
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
            if lease not in lease.model.waiting:
                settled(None)
        finally:
            close_fds(fds)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                log.warning("no descriptor left for another client: raise `ulimit -n`")
                self._loop.remove_reader(listener)  # it stays readable: pause, not spin
                self._loop.call_later(
                    _ACCEPT_PAUSE_S, self._loop.add_reader, listener, self._accept, listener
                )
            return
        self._connections.add(Connection(self.service, sock, self._connections.discard))

    def _reap(self) -> None:
        self.keeper.pool.reap()
        self._loop.call_later(_REAP_EVERY_S, self._reap)

    def _call_soon(self, function: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function)


def lock_socket(path: Path) -> int:
    """Take the place beside a socket that one store at a time has; it is left with its process.

    Raises:
        StoreError: Another store has it, or it cannot be made.
    """
    lock_path = path.with_name(f"{path.name}.lock")
    try:
        # The socket's own mode says who may connect; its directory only has to be ours.
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise StoreError(
            f"cannot listen at `{path}`: {exc.strerror or exc}",
            hint="give another --socket, in a directory of yours",
        ) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StoreError(
            f"a store serves `{path}` already",
            hint="`sllmctl status` shows it; or give another --socket",
        ) from None
    return fd


def listen(path: Path, group: int | None) -> socket.socket:
    """Listen at a path; a socket that nobody serves any more is replaced.

    Raises:
        StoreError: Somebody serves it, or it cannot be made.
    """
    try:
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

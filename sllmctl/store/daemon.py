"""`sllmctl serve`: the event loop around the keeper."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from sllmctl.core.units import format_size
from sllmctl.errors import CheckpointError, ConfigError, StoreError
from sllmctl.store.backing import choose_backing
from sllmctl.store.files import open_named
from sllmctl.store.keeper import Keeper
from sllmctl.store.lookups import Lookups
from sllmctl.store.pool import Pool
from sllmctl.store.protocol import Message, allow_descriptors
from sllmctl.store.service import Service, Settings
from sllmctl.store.session import Session

log = logging.getLogger(__name__)
_REAP_EVERY_S = 0.5
_REASSURE_EVERY_S = 10.0
_BACKLOG = 1024
_ACCEPT_PAUSE_S = 1.0
_ANSWER_S = 5.0
_DRAIN_S = 8.0
"""How long SIGTERM lets loads go on: container engines kill after 10 s."""
_DRAIN_EVERY_S = 0.05
_PR_SET_DUMPABLE = 4


class Daemon:
    """Serves one pool at one socket until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._sessions: set[Session] = set()
        self._socket_inode = 0
        self._loop = asyncio.new_event_loop()
        self._stop = threading.Event()
        pool = Pool(settings.pool_bytes, settings.segment_bytes, choose_backing)
        self.keeper = Keeper(pool, self._call_soon, settings.threads)
        self.service = Service(settings, self.keeper, Lookups(self._loop))

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; ``ready`` is called when clients can come.

        After SIGTERM no more clients are taken, and loads that are under way have 8 s to end; a
        second signal, or SIGINT, ends it at once. Whoever is left goes on from disk.

        Raises:
            StoreError: Another store serves this socket, or it cannot be made.
            ConfigError: A model to preload is not there.
        """
        asyncio.set_event_loop(self._loop)
        # A segment takes two, a client one, a fill one a shard.
        allow_descriptors()
        _hide_memory()
        lock = lock_socket(self.settings.socket_path)
        listener = listen(self.settings.socket_path, self.settings.group)
        self._socket_inode = self.settings.socket_path.stat().st_ino
        prefault = threading.Thread(
            target=self.keeper.pool.prefault, args=(self._stop,), name="sllm-prefault", daemon=True
        )
        metrics = None
        try:
            if self.settings.metrics is not None:
                from sllmctl.store.metrics import serve_metrics

                metrics = serve_metrics(self.settings.metrics, self._ask)
            self._loop.add_reader(listener, self._accept, listener)
            self._loop.add_signal_handler(signal.SIGTERM, self._drain, listener)
            self._loop.add_signal_handler(signal.SIGINT, self._loop.stop)
            self._loop.call_later(_REAP_EVERY_S, self._reap)
            self._loop.call_later(_REASSURE_EVERY_S, self._reassure)
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
            self._stop_listening(listener)
            for session in list(self._sessions):
                self._loop.call_soon(session.end)
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()
            self.keeper.close()
            self._loop.close()
            os.close(lock)

    def _drain(self, listener: socket.socket) -> None:
        """Take no more clients, and end when those have what they wait for, or after a while."""
        if listener.fileno() < 0:  # told so before
            self._loop.stop()
            return
        self._loop.remove_reader(listener)
        self._stop_listening(listener)
        log.info("no more clients are taken; loads under way have %.0f s to end", _DRAIN_S)
        self._end_when_drained(time.monotonic() + _DRAIN_S)

    def _end_when_drained(self, deadline: float) -> None:
        if any(session.busy for session in self._sessions) and time.monotonic() < deadline:
            self._loop.call_later(_DRAIN_EVERY_S, self._end_when_drained, deadline)
        else:
            self._loop.stop()

    def _stop_listening(self, listener: socket.socket) -> None:
        listener.close()
        with suppress(OSError):
            if self.settings.socket_path.stat().st_ino == self._socket_inode:
                self.settings.socket_path.unlink()

    def _ask(self) -> Message:
        """The status, for another thread."""
        answer: Future[Message] = Future()
        self._call_soon(lambda: answer.set_result(self.service.status()))
        return answer.result(_ANSWER_S)

    def _preload(self, name: str) -> None:
        try:
            files = open_named(self.settings.storage, name)
        except (StoreError, CheckpointError) as exc:
            raise ConfigError(f"cannot preload `{name}`: {exc}", hint=exc.hint) from exc

        def settled(reason: str | None) -> None:
            model = lease.model
            if reason is None and model.warm_bytes < model.nbytes:
                log.warning(
                    "only %s of `%s`, which is %s, found room in the pool",
                    *(format_size(model.warm_bytes), name, format_size(model.nbytes)),
                )
            self.keeper.release(lease)

        try:
            lease = self.keeper.attach(
                files, pid=os.getpid(), arrived=lambda _: None, settled=settled
            )
            if lease not in lease.model.waiting:
                settled(None)
        finally:
            files.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                log.warning("no descriptor left for another client: raise `ulimit -n`")
                self._loop.remove_reader(listener)  # it stays readable: pause, not spin
                self._loop.call_later(_ACCEPT_PAUSE_S, self._listen_again, listener)
            return
        self._sessions.add(Session(self.service, sock, self._sessions.discard))

    def _listen_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener, self._accept, listener)

    def _reap(self) -> None:
        self.keeper.pool.reap()
        self._loop.call_later(_REAP_EVERY_S, self._reap)

    def _reassure(self) -> None:
        self.keeper.reassure()
        self._loop.call_later(_REASSURE_EVERY_S, self._reassure)

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
        # Before anything is made beside it: /etc/passwd.lock, say, is another program's.
        if path.exists() and not path.is_socket():
            raise FileExistsError(errno.EEXIST, "it is there already, and no socket")
        # The socket's own mode says who may connect; its directory only has to be ours.
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise StoreError(
            f"cannot listen at `{path}`: {exc.strerror or exc}",
            hint="give another --socket, in a directory that you own",
        ) from exc
    deadline = time.monotonic() + _DRAIN_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Without a socket it has just begun, or is ending.
            if not path.is_socket() and time.monotonic() < deadline:
                time.sleep(_DRAIN_EVERY_S)
                continue
            os.close(fd)
            raise StoreError(
                f"a store serves `{path}` already",
                hint="`sllmctl status` shows it; or give another --socket",
            ) from None
        return fd


def listen(path: Path, group: int | None) -> socket.socket:
    """Listen at a path whose lock we have; a socket is there of a store that was killed.

    Raises:
        StoreError: It cannot be made.
    """
    try:
        if path.is_socket():
            path.unlink()
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
            hint="give another --socket, at most 107 bytes long, in a directory that you own",
        ) from exc
    return sock


def _hide_memory() -> None:
    """Keep processes of the same user from our descriptors and memory, and a dump from the disk.

    Source: prctl(2), PR_SET_DUMPABLE; ptrace(2), access mode checking.
    """
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

"""Everything that a check may touch, behind one object: this machine."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import mmap
import os
import posixpath
import selectors
import signal
import stat
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sllmctl.doctor.elf import Elf, parse_elf
from sllmctl.doctor.host import Host
from sllmctl.doctor.store_answer import Answer, ask_store

READ_BYTES = 64 << 10
RUN_TIMEOUT_S = 10.0
RUN_BYTES = 256 << 10
CONNECT_TIMEOUT_S = 1.0
WALK_ENTRIES = 20_000


def parse_json(text: str) -> Any:
    """A JSON document; None for what is none, also for one that is nested without end."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that was run; ``code`` is None after the time limit, 127 without the command."""

    code: int | None
    out: str = ""
    err: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """A file system entry: kind is char, dir, file, socket or other."""

    kind: str
    mode: int
    uid: int
    gid: int
    size: int = 0
    mtime: float = 0.0


@dataclass(frozen=True, slots=True)
class Space:
    """A file system's size, in bytes and inodes; no inodes where it does not count them."""

    total_bytes: int
    free_bytes: int
    total_inodes: int = 0
    free_inodes: int = 0


class Probe:
    """This machine. Nothing here raises for what a machine may be like."""

    def __init__(self, host: Host | None = None, root: str = "/") -> None:
        self.host = host or Host.here()
        self.root = root

    @property
    def env(self) -> dict[str, str]:
        """The environment of the process."""
        return dict(self.host.env)

    def real(self, path: str) -> str | None:
        """Where the bytes of a path lie on this machine; None if a link leads nowhere."""
        return path

    def exists(self, path: str) -> bool:
        """Whether the path leads to something."""
        return self.stat(path) is not None

    def is_dir(self, path: str) -> bool:
        """Whether it is a directory."""
        node = self.stat(path)
        return node is not None and node.kind == "dir"

    def lexists(self, path: str) -> bool:
        """Whether there is an entry, be it a link to nowhere."""
        return self.readlink(path) is not None or self.exists(path)

    def stat(self, path: str) -> Node | None:
        """What a path leads to, or None."""
        real = self.real(path)
        if real is None:
            return None
        try:
            found = os.stat(real)  # noqa: PTH116
        except (OSError, ValueError):
            return None
        mode = found.st_mode
        kind = (
            "char" if stat.S_ISCHR(mode)
            else "dir" if stat.S_ISDIR(mode)
            else "file" if stat.S_ISREG(mode)
            else "socket" if stat.S_ISSOCK(mode)
            else "other"
        )  # fmt: skip
        return Node(
            kind, stat.S_IMODE(mode), found.st_uid, found.st_gid, found.st_size, found.st_mtime
        )

    def readlink(self, path: str) -> str | None:
        """Target of a link, or None."""
        parent = self.real(posixpath.dirname(path) or "/")
        if parent is None:
            return None
        try:
            return os.readlink(posixpath.join(parent, posixpath.basename(path)))  # noqa: PTH115
        except (OSError, ValueError):
            return None

    def realpath(self, path: str) -> str:
        """The path without links, as this machine would name it."""
        try:
            return os.path.realpath(path)
        except (OSError, ValueError):
            return path

    def listdir(self, path: str) -> list[str]:
        """Sorted names in a directory; none if it cannot be read."""
        real = self.real(path)
        try:
            return sorted(os.listdir(real)) if real is not None else []  # noqa: PTH208
        except (OSError, ValueError):
            return []

    def glob(self, pattern: str) -> list[str]:
        """Paths that match a pattern, part by part; `*` does not cross a slash."""
        found = ["/"]
        for part in pattern.strip("/").split("/"):
            if any(c in part for c in "*?["):
                found = [
                    posixpath.join(base, name)
                    for base in found
                    for name in fnmatch.filter(self.listdir(base), part)
                ]
            else:
                found = [posixpath.join(base, part) for base in found]
        return [path for path in found if self.lexists(path)]

    def read_bytes(self, path: str, limit: int = READ_BYTES) -> bytes | None:
        """The first bytes of a regular file, or None."""
        real = self.real(path)
        node = self.stat(path)
        if real is None or node is None or node.kind != "file":
            return None
        try:
            with open(real, "rb") as source:  # noqa: PTH123
                return source.read(limit)
        except OSError:
            return None

    def read_text(self, path: str, limit: int = READ_BYTES) -> str | None:
        """The first characters of a text file, whatever its encoding, or None."""
        raw = self.read_bytes(path, limit)
        return None if raw is None else raw.decode("utf-8-sig", "replace")

    def elf(self, path: str) -> Elf | None:
        """What a shared library says about itself, or None."""
        real = self.real(path)
        node = self.stat(path)
        if real is None or node is None or node.kind != "file":
            return None
        try:
            fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return parse_elf(lambda at, size: os.pread(fd, size, at))
        except OSError:
            return None
        finally:
            os.close(fd)

    def may(self, path: str, mode: int) -> bool:
        """Whether this process may read, write or enter (os.R_OK, W_OK, X_OK)."""
        return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)

    def run(self, argv: Sequence[str], timeout_s: float = RUN_TIMEOUT_S) -> Ran:
        """Run a command and take the first 256 KiB of what it says."""
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError:
            return Ran(127)
        try:
            out, err = _output(child, timeout_s)
        finally:
            # What it started may live on, and hold what it took.
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            # A child in an uninterruptible driver call does not die: do not wait for it for ever.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1)
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()
        if out is None:
            return Ran(None)
        return Ran(child.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))

    def connects(self, host: str, port: int) -> bool:
        """Whether a TCP port answers."""
        import socket

        try:
            with socket.create_connection((host, port), CONNECT_TIMEOUT_S):
                return True
        except OSError:
            return False

    def ask_store(self, path: str) -> Answer:
        """What a store of sllmctl says at its socket, within two seconds."""
        node = self.stat(path)
        if node is None or node.kind != "socket":
            return Answer("no socket")
        return ask_store(path)

    def bytes_below(self, path: str, most: int) -> int:
        """Bytes of the files below a directory; stops when it has seen more than ``most``."""
        total, todo, entries = 0, [path], 0
        while todo and total <= most and entries < WALK_ENTRIES:
            place = todo.pop()
            for name in self.listdir(place):
                entries += 1
                inner = f"{place}/{name}"
                if self.readlink(inner) is not None:
                    continue
                node = self.stat(inner)
                if node is not None and node.kind == "dir":
                    todo.append(inner)
                elif node is not None:
                    total += node.size
        return total

    def get(self, url: str, timeout_s: float = 3.0, *, direct: bool = True) -> tuple[int, str]:
        """Status and body of an HTTP GET; status 0 with the reason if there is no answer.

        Args:
            url: http or https.
            timeout_s: Upper bound of each wait.
            direct: Past every proxy, as one talks to this machine.
        """
        import http.client
        import urllib.error
        import urllib.request

        handlers = [urllib.request.ProxyHandler({})] if direct else []
        opener = urllib.request.build_opener(*handlers)
        try:
            with opener.open(url, timeout=timeout_s) as answer:
                return answer.status, answer.read(1 << 20).decode("utf-8", "replace")
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read(1 << 16).decode("utf-8", "replace")
        except (OSError, ValueError, http.client.HTTPException) as exc:
            return 0, str(exc)

    def space(self, path: str) -> Space | None:
        """Size and free space of the file system of a path, or None."""
        try:
            found = os.statvfs(path)
        except OSError:
            return None
        return Space(
            found.f_blocks * found.f_frsize,
            found.f_bavail * found.f_frsize,
            found.f_files,
            found.f_favail,
        )

    def direct_io(self, directory: str) -> bool | None:
        """Whether files in a directory can be read with O_DIRECT; None if it cannot be tried."""
        name = f"{directory}/.sllmctl-doctor-{os.getpid()}"
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            with contextlib.suppress(OSError):
                os.write(fd, bytes(4096))
            try:
                direct = os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as exc:
                return False if exc.errno == 22 else None
            try:
                with mmap.mmap(-1, 4096) as buffer:
                    os.preadv(direct, [buffer], 0)
                return True
            except OSError as exc:
                return False if exc.errno == 22 else None
            finally:
                os.close(direct)
        finally:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(name)  # noqa: PTH108


def _output(child: subprocess.Popen[bytes], timeout_s: float) -> tuple[bytes | None, bytes]:
    """The beginnings of what a child says until it ends; None if it does not end in time."""
    assert child.stdout is not None
    assert child.stderr is not None
    ends_s = time.monotonic() + timeout_s
    said = {child.stdout: bytearray(), child.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for pipe in said:
            selector.register(pipe, selectors.EVENT_READ)
        while time.monotonic() < ends_s:
            ended = child.poll() is not None
            ready = selector.select(0 if ended else min(0.05, timeout_s))
            for key, _ in ready:
                pipe = child.stdout if key.fileobj is child.stdout else child.stderr
                data = os.read(key.fd, 1 << 16)
                said[pipe] += data[: RUN_BYTES - len(said[pipe])]  # the rest is read, and dropped
                if not data:
                    selector.unregister(pipe)
            if ended and not (ready and selector.get_map()):
                return bytes(said[child.stdout]), bytes(said[child.stderr])
    return None, b""

"""The process in which a hub's client runs, and what it says to the one that started it.

The request is a line of JSON on standard input, the answers are lines of JSON on standard output:

- ``asking``: the client is loaded and the hub is being asked for the list of files;
- ``listed``: the hub has answered;
- ``plan``: what will be fetched; the process then waits for a line ``go``;
- ``progress``: bytes that are there, several times a second;
- ``done`` or ``error``: the last line.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sllmctl.core.hub.files import choose_files

if TYPE_CHECKING:
    from sllmctl.core.hub.huggingface import HuggingFace
    from sllmctl.core.hub.modelscope import ModelScope

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PROGRESS_INTERVAL_S = 0.2
_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
_CACHE_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR}
_BAD_ADDRESS = {"InvalidSchema", "InvalidURL", "MissingSchema", "UnsupportedProtocol"}
_NO_CONNECTION = {"ConnectTimeoutError", "ConnectionRefusedError", "NewConnectionError", "gaierror"}
_UNREACHABLE = {
    "ConnectError",
    "ConnectionError",
    "NetworkError",
    "Timeout",
    "TimeoutException",
    "TransportError",
    "gaierror",
}


def main() -> NoReturn:
    """Serve one request, then leave without waiting for the client's threads."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A terminal's Ctrl-C reaches the whole process group; the parent process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = os.dup(1)
    os.dup2(2, 1)  # what a client prints must not end up among the answers
    request = json.loads(sys.stdin.readline() or "{}")
    if os.getppid() != request.get("parent_pid"):
        os._exit(1)
    status = 0
    try:
        for answer in _serve(request):
            os.write(channel, json.dumps(answer).encode() + b"\n")
    except BrokenPipeError:
        status = 1
    except BaseException as exc:
        os.write(channel, json.dumps({"event": "error", **describe(exc)}).encode() + b"\n")
        status = 1
    os._exit(status)


def _serve(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    client = _client(request)
    yield {"event": "asking"}
    sizes = client.list_files()
    yield {"event": "listed"}
    names = choose_files(
        sizes, include=request["include"], exclude=request["exclude"], read_index=client.read
    )
    done_bytes = {name: client.bytes_present(name) for name in names}
    yield {
        "event": "plan",
        "revision": client.revision,
        "files": names,
        "total_bytes": sum(sizes[name] for name in names),
        "done_bytes": sum(done_bytes.values()),
    }
    if sys.stdin.readline() != "go\n":
        os._exit(1)
    outcome: list[Path | BaseException] = []
    worker = threading.Thread(
        target=_download, args=(client, names, done_bytes, outcome), daemon=True
    )
    worker.start()
    while worker.is_alive():
        worker.join(_PROGRESS_INTERVAL_S)
        yield {"event": "progress", "done_bytes": sum(done_bytes.values())}
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    yield {"event": "done", "path": str(outcome[0])}


def _client(request: dict[str, Any]) -> HuggingFace | ModelScope:
    arguments = request["name"], request["revision"], request["timeout_s"]
    if request["hub"] == "modelscope":
        from sllmctl.core.hub.modelscope import ModelScope

        return ModelScope(*arguments)
    from sllmctl.core.hub.huggingface import HuggingFace

    return HuggingFace(*arguments)


def _download(
    client: HuggingFace | ModelScope,
    names: list[str],
    done_bytes: dict[str, int],
    outcome: list[Path | BaseException],
) -> None:
    try:
        outcome.append(client.download(names, done_bytes))
    except BaseException as exc:
        outcome.append(exc)


def describe(error: BaseException) -> dict[str, str]:
    """Sort a client's exception by what a person can do about it.

    The clients' exception classes differ between versions and HTTP libraries, so this goes by
    status codes, system error numbers and class names along the chain of causes.

    Returns:
        ``reason``, a word that the parent process has a message for, and ``detail``, one line.
    """
    chain = list(_chain(error))
    kinds = {kind.__name__ for exc in chain for kind in type(exc).__mro__}
    detail = _detail(chain)
    return {"reason": _reason(chain, kinds, detail), "detail": detail}


def _reason(chain: list[BaseException], kinds: set[str], detail: str) -> str:
    numbers = {exc.errno for exc in chain if isinstance(exc, OSError)}
    if numbers & _DISK_ERRNOS:
        return "disk_full"
    if isinstance(chain[0], ImportError):
        return "no_client"
    for kind, reason in (("GatedRepoError", "gated"), ("RevisionNotFoundError", "no_revision")):
        if kind in kinds:
            return reason
    status = next(filter(None, map(_status, chain)), None)
    if status is not None:
        named = {401: "no_access", 403: "forbidden", 404: "not_found", 407: "proxy"}
        if "RepositoryNotFoundError" in kinds and status == 401:
            return "not_public"
        return named.get(status, "server" if status >= 500 or status == 429 else "failed")
    if kinds & {"ServerError", "RateLimitError"}:
        return "server"
    if "ProxyError" in kinds and not kinds & _NO_CONNECTION:
        return "proxy"
    if kinds & _BAD_ADDRESS:
        return "endpoint"
    if "SSLError" in kinds:
        # A handshake that is cut off is a network's doing; only a completed one can be wrong.
        cut = any(word in detail for word in ("EOF", "reset", "timed out"))
        return "unreachable" if cut else "tls"
    if kinds & _UNREACHABLE:
        return "unreachable"
    return "cache" if numbers & _CACHE_ERRNOS else "failed"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Walk from an exception to its causes, through the ways in which the clients wrap them."""
    pending, seen = [error], set[int]()
    while pending:
        exc = pending.pop(0)
        if id(exc) in seen:
            continue
        seen.add(id(exc))
        yield exc
        failed = getattr(exc, "failed_files", None)
        inner = [exc.__cause__, exc.__context__, getattr(exc, "reason", None), *exc.args]
        inner += failed.values() if isinstance(failed, dict) else []
        pending += [item for item in inner if isinstance(item, BaseException)]


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    status = status or getattr(error, "status_code", None)
    return status if isinstance(status, int) else None


def _detail(chain: list[BaseException]) -> str:
    """Return the system's own words if there are any, else the outermost exception's first line."""
    for exc in reversed(chain):
        if isinstance(exc, OSError) and exc.errno and exc.strerror:
            where = f": {exc.filename}" if exc.filename else ""
            return f"{exc.strerror}{where}"
    for exc in chain:
        lines = str(exc).strip().splitlines()
        if lines:
            return lines[0][:300]
    return type(chain[0]).__name__

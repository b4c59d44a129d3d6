"""Running a hub's client in a process of its own.

So the client's imports stay out of ours, one that hangs can be ended at once, and none outlives
the process that wanted it.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sllmctl.core.progress import ProgressFn

_START_DEADLINE_S = 120.0
_SLICE_S = 0.2
_STDERR_KEPT_BYTES = 8192
_READ_BYTES = 65536

# sys.path travels along, so that the child sees the packages that we see, and not those that
# happen to lie in the current folder.
_CODE = "import sys; sys.path[:] = sys.argv[1:]; from sllmctl.core.hub.child import main; main()"

_ENVIRONMENT = {
    # Xet cannot continue a file that broke off; whoever prefers its speed sets this to 0.
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    # The client gives up on a file after an hour by default, whatever its size.
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "604800",
}


class ClientError(Exception):
    """A hub's client failed; ``reason`` is one of the words of ``hub.child``.

    Attributes:
        planned: The hub had answered, and files were to be fetched.
        done_bytes: Bytes that were there when it failed.
        total_bytes: Bytes of all files to fetch, or 0 before that is known.
    """

    def __init__(
        self,
        hub: str,
        reason: str,
        detail: str,
        *,
        planned: bool = False,
        done_bytes: int = 0,
        total_bytes: int = 0,
    ) -> None:
        super().__init__(detail)
        self.hub = hub
        self.reason = reason
        self.detail = detail
        self.planned = planned
        self.done_bytes = done_bytes
        self.total_bytes = total_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What a download will fetch: names, and bytes in all and of them already there."""

    revision: str
    files: tuple[str, ...]
    total_bytes: int
    done_bytes: int


@dataclass(frozen=True, slots=True)
class Request:
    """One model wanted from one hub."""

    hub: str
    name: str
    revision: str | None
    include: Sequence[str]
    exclude: Sequence[str]
    reach_deadline_s: float


def run_client(
    request: Request, *, approve: Callable[[Plan], None], progress: ProgressFn | None
) -> tuple[Path, Plan]:
    """Fetch a model in a child process.

    Args:
        request: What to fetch, and how long the hub may take to list the files.
        approve: Called with the plan before a byte of it is fetched; raises to stop.
        progress: Called with the stage ``download``.

    Returns:
        The folder with the files, and what was planned.

    Raises:
        ClientError: The client failed, died or did not reach the hub in time.
    """
    plan: Plan | None = None
    done_bytes = 0
    with _Child(request) as child:
        for answer in child.answers():
            event = answer["event"]
            if event == "asking":
                child.deadline = time.monotonic() + request.reach_deadline_s
            elif event == "listed":
                child.deadline = None
            elif event == "plan":
                done_bytes = answer["done_bytes"]
                plan = Plan(
                    answer["revision"], tuple(answer["files"]), answer["total_bytes"], done_bytes
                )
                approve(plan)
                child.proceed()
            elif event == "progress" and plan is not None:
                done_bytes = answer["done_bytes"]
            elif event == "done" and plan is not None:
                done_bytes = plan.total_bytes
            elif event == "error":
                raise ClientError(
                    request.hub,
                    answer["reason"],
                    answer["detail"],
                    planned=plan is not None,
                    done_bytes=done_bytes,
                    total_bytes=plan.total_bytes if plan else 0,
                )
            if progress is not None and plan is not None:
                progress("download", min(done_bytes, plan.total_bytes), plan.total_bytes)
            if event == "done" and plan is not None:
                return Path(answer["path"]), plan
        raise ClientError(request.hub, "died", child.last_words(), planned=plan is not None)


class _Child:
    """The child process; leaving the ``with`` ends it, whatever it was doing."""

    def __init__(self, request: Request) -> None:
        self._hub = request.hub
        self.deadline: float | None = time.monotonic() + _START_DEADLINE_S
        self._errors = b""
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _CODE, *_search_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**_ENVIRONMENT, **os.environ},
            bufsize=0,
        )
        line = {
            "hub": request.hub,
            "name": request.name,
            "revision": request.revision,
            "include": list(request.include),
            "exclude": list(request.exclude),
            "timeout_s": request.reach_deadline_s,
            "parent_pid": os.getpid(),
        }
        self._write(json.dumps(line))

    def __enter__(self) -> _Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def proceed(self) -> None:
        """Let the child fetch what it planned."""
        self._write("go")

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield the child's answers until it closes its output.

        Raises:
            ClientError: The deadline passed.
        """
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout is not None
        assert stderr is not None
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(stderr, selectors.EVENT_READ)
            while selector.get_map():
                if self.deadline is not None and time.monotonic() > self.deadline:
                    raise ClientError(self._hub, "unreachable", "no answer in time")
                for key, _ in selector.select(_SLICE_S):
                    block = os.read(key.fd, _READ_BYTES)
                    if not block:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is stderr:
                        self._errors = (self._errors + block)[-_STDERR_KEPT_BYTES:]
                    else:
                        *lines, rest = (rest + block).split(b"\n")
                        yield from map(json.loads, lines)

    def last_words(self) -> str:
        """Say how the child ended, with the last line that it wrote to standard error."""
        status = self._process.wait()
        ending = f"signal {-status}" if status < 0 else f"exit status {status}"
        lines = self._errors.decode(errors="replace").strip().splitlines()
        return f"{ending}: {lines[-1][:300]}" if lines else ending

    def _write(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(line.encode() + b"\n")
        except BrokenPipeError:
            return  # it ended; its output says why


def _search_path() -> list[str]:
    return [str(Path.cwd()) if entry == "" else entry for entry in sys.path]

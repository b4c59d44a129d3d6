"""Conversions that kill themselves at their n-th step.

A step is a system call that changes something on disk. `python -m tests.convert.killed` reads
`[N, SOURCE, TARGET, OPTION...]` in JSON, a line each, and answers with the exit status of a
conversion in a forked child, negative for a signal. Options: `force`, `two-renames`,
`sllm-store`, `ranks`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sllmctl.core.write import target as target_module
from sllmctl.core.write.convert import convert
from sllmctl.core.write.sllm_store_ranks import convert_ranks

_AUDITED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def convert_until(at: int, source: str, target: str, *options: str) -> None:
    """Convert, and be killed before step ``at`` if it comes to that."""
    lock = threading.Lock()
    steps = 0

    def step() -> None:
        nonlocal steps
        with lock:
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return function(*args, **kwargs)

        return call

    os.pwrite = counted(os.pwrite)
    os.fsync = counted(os.fsync)
    exchange, rename_new = target_module.exchange, target_module.rename_new
    if "two-renames" in options:
        exchange = rename_new = lambda *_: False
    else:
        exchange, rename_new = counted(exchange), counted(rename_new)
    target_module.exchange, target_module.rename_new = exchange, rename_new
    sys.addaudithook(lambda event, _: step() if event in _AUDITED else None)
    run = convert_ranks if "ranks" in options else convert
    run(
        Path(source),
        Path(target),
        max_shard_bytes=10_000,
        force="force" in options,
        file_format="sllm-store" if "sllm-store" in options else "safetensors",
    )


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                convert_until(*json.loads(line))
                status = 0
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()

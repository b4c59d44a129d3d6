"""A real store in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sllmctl.store.client import StoreClient
from tests.conftest import some_tensors, write_checkpoint

MIB = 2**20
DEADLINE_S = 60.0


class RunningStore:
    """`sllmctl serve`, its socket, and what it holds.

    Args:
        directory: For socket and models.
        arguments: Further ones of the command.
        pool: Size of the pool.
        verbose: Log more.
        before: Python to run in the process before the command.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        pool: str = "64MiB",
        verbose: bool = False,
        before: str = "",
    ) -> None:
        self.socket = directory / "store.sock"
        self.storage = directory / "models"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", f"{before}\nfrom sllmctl.cli import main; main()"),
                *(["-v"] if verbose else []),
                *("serve", "--mem-pool-size", pool),
                *("--socket", str(self.socket), "--storage-path", str(self.storage)),
                *("--segment-size", "2MiB", *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.greeting = []
        for line in self.process.stdout:
            self.greeting.append(line.rstrip())
            if line.startswith("ready"):
                return
        raise AssertionError(self.process.communicate()[1])

    def status(self) -> dict[str, Any]:
        with StoreClient(self.socket) as client:
            return client.ask({"op": "status"})

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status for which the condition holds."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            status = self.status()
            if condition(status):
                return status
            assert time.monotonic() < deadline, status
            time.sleep(0.05)

    def open_descriptors(self, *, segments: bool = False) -> int:
        """How many; those of the pool, which makes segments when it likes, only if asked for."""
        names = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                names.append(link.readlink().name)
        return sum(segments or "segment" not in name for name in names)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            _, errors = self.process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if number == signal.SIGTERM:
            assert "Traceback" not in errors, errors
        return self.process.returncode


@pytest.fixture
def start_store(tmp_path: Path) -> Iterator[Callable[..., RunningStore]]:
    """Start a store with a pool of 64 MiB in segments of 2 MiB, unless said otherwise."""
    stores: list[RunningStore] = []

    def start(*arguments: str, directory: Path = tmp_path, **options: Any) -> RunningStore:
        stores.append(RunningStore(directory, *arguments, **options))
        return stores[-1]

    yield start
    for store in stores:
        store.end()


@pytest.fixture
def store(start_store: Callable[..., RunningStore]) -> RunningStore:
    return start_store()


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of about so many MiB, in shards of various sizes, below the storage."""
    import torch

    def make(name: str, mib: int = 9, seed: int = 0, shards: int = 3) -> Path:
        generator = torch.Generator().manual_seed(seed)
        files: dict[str, dict[str, torch.Tensor]] = {}
        for number in range(shards):
            rows = mib * MIB // shards // 2048 + 7 * number
            files[f"model-{number + 1:05}-of-{shards:05}.safetensors"] = {
                **some_tensors(number),
                f"big.{number}": torch.randint(
                    -100, 100, (rows, 2048), dtype=torch.int8, generator=generator
                ),
            }
        return write_checkpoint(tmp_path / "models" / name, files)

    return make

"""A store of our own to measure loads through, and what idle leases cost it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sllmctl.bench.measure import Sample, memory
from sllmctl.bench.ways import Subject
from sllmctl.core.load import open_shard
from sllmctl.errors import StoreError
from sllmctl.store.client import StoreClient

IDLE_LEASES = 1000
_START_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 20.0
_POLL_S = 0.05
_MIN_POOL_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Store:
    """A store that runs."""

    socket: Path
    pid: int

    def ask(self, **message: Any) -> dict[str, Any]:
        """One request, one answer."""
        with StoreClient(self.socket) as client:
            return client.ask(message)

    def work(self) -> tuple[float, int]:
        """Processor seconds of the store so far, and bytes that it has read from the disk.

        Source: proc(5), fields 14 and 15 of ``stat``, and ``io``, which only root may see of it.
        """
        proc = Path("/proc") / str(self.pid)
        ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
        lines = []
        with suppress(OSError):
            lines = (proc / "io").read_text().splitlines()
        read = [int(line.split()[1]) for line in lines if line.startswith("read_bytes:")]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), sum(read)

    def with_its_work(self, sample: Callable[[], Sample]) -> Sample:
        """A sample to which the store's own processor time and reads are added."""
        cpu_s, nbytes = self.work()
        taken = sample()
        after_s, after = self.work()
        return replace(
            taken,
            cpu_s=taken.cpu_s + after_s - cpu_s,
            disk_bytes=taken.disk_bytes + after - nbytes,
        )

    def empty(self) -> None:
        """Evict everything, once nobody uses it any more."""
        self._settle()
        self.ask(op="evict", name=None)

    def warm_fraction(self, label: str, nbytes: int) -> float:
        """How much of a model is in memory."""
        models = self.ask(op="status")["models"]
        warm = sum(model["warm_bytes"] for model in models if model["name"] == label)
        return min(1.0, warm / nbytes) if nbytes else 0.0

    def _settle(self) -> None:
        deadline = time.monotonic() + _STOP_DEADLINE_S
        while self.ask(op="status")["leases"]:
            if time.monotonic() > deadline:
                raise StoreError("leases of ended processes stay")
            time.sleep(_POLL_S)


def pool_for(nbytes: int) -> int:
    """A pool that holds a checkpoint with ease: segments are whole."""
    return nbytes + max(nbytes // 2, _MIN_POOL_BYTES)


@contextmanager
def running_store(pool_bytes: int, segment_bytes: int | None = None) -> Iterator[Store]:
    """A store with a pool of so many bytes, all of them supplied; it ends with the block.

    Raises:
        StoreError: It does not start.
    """
    # A socket's path has 107 bytes at most, whatever directory we are in.
    with tempfile.TemporaryDirectory(prefix="sllmctl-") as directory:
        socket = Path(directory) / "store.sock"
        command = [sys.executable, "-m", "sllmctl", "serve", "--mem-pool-size", str(pool_bytes)]
        command += ["--socket", str(socket)]
        if segment_bytes is not None:
            command += ["--segment-size", str(segment_bytes)]
        with (Path(directory) / "log").open("w+") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )
            try:
                store = Store(socket, process.pid)
                _wait_until_ready(store, process, Path(log.name))
                yield store
            finally:
                process.terminate()
                try:
                    process.wait(_STOP_DEADLINE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _wait_until_ready(store: Store, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            text = log.read_text().strip().partition("\n")[0]
            raise StoreError(f"the store ended: {text.removeprefix('error: ')}")
        with suppress(StoreError):
            pool = store.ask(op="status")["pool"]
            if pool["prefaulted_bytes"] >= pool["bytes"]:
                return
        time.sleep(_POLL_S)
    raise StoreError(f"the store's memory was not supplied within {_START_DEADLINE_S:.0f} s")


def idle_leases(subject: Subject, store: Store, count: int) -> Sample:
    """Load while so many idle leases are held; the memory is the store's own, for the leases."""
    from sllmctl.bench.ways import OURS_STORE

    before = memory(store.pid)["RssAnon"]
    with ExitStack() as stack:
        for _ in range(count):
            _lease(subject, store, stack)
        grown = memory(store.pid)["RssAnon"] - before
        sample = OURS_STORE.sample(subject)
    return Sample(sample.ready_s, sample.all_s, cpu_s=sample.cpu_s, private_bytes=max(0, grown))


def _lease(subject: Subject, store: Store, stack: ExitStack) -> None:
    client = stack.enter_context(StoreClient(store.socket))
    shards = subject.checkpoint.shards
    with ExitStack() as files:
        fds = [open_shard(shard, files) for shard in shards]
        client.send_shards([shard.path.name for shard in shards], fds)
        client.send({"op": "attach", "label": "idle"})
        while True:
            message, parts = client.receive()
            for fd in parts:
                os.close(fd)
            if message.get("event") == "settled":
                return

"""A thousand idle leases: what they cost the store in memory, and a newcomer in time.

`python -m tests.torture.leases --count 1000`
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

from sllmctl.store.client import StoreClient
from tests.store.conftest import RunningStore
from tests.torture.store import make_models
from tests.torture.store_client import digest_through_store, shards_of


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own: the pool is shared memory, and does not count."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")


def attach(store: RunningStore, model: Path) -> StoreClient:
    """A lease that nobody uses."""
    client = StoreClient(store.socket)
    fds = [os.open(shard, os.O_RDONLY) for shard in shards_of(model)]
    client.send_shards([shard.name for shard in shards_of(model)], fds)
    client.send({"op": "attach", "label": "idle"})
    while True:
        message, parts = client.receive()
        for fd in [*parts, *([] if message["event"] != "attached" else fds)]:
            os.close(fd)
        if message["event"] == "settled":
            return client


def latency_s(store: RunningStore, model: Path) -> float:
    """Median time of a warm attach, its bytes compared included."""
    times = []
    for _ in range(21):
        started = time.perf_counter()
        attach(store, model).close()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Measure before, with, and after the leases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    count = parser.parse_args().count
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as directory:
        store = RunningStore(Path(directory))
        (model,) = make_models(store.storage, 1)
        digest_through_store(store.socket, model)
        memory, latency = resident_bytes(store.process.pid), latency_s(store, model)
        leases = [attach(store, model) for _ in range(count)]
        assert sum(model["leases"] for model in store.status()["models"]) == count
        grown = resident_bytes(store.process.pid) - memory
        crowded = latency_s(store, model)
        for lease in leases:
            lease.close()
        store.wait_for(lambda status: not status["leases"])
        assert store.end() == 0
    print(
        f"{count} leases: {grown / 1e6:.1f} MB more in the store; a warm attach takes "
        f"{1000 * latency:.2f} ms without them, {1000 * crowded:.2f} ms with them"
    )


if __name__ == "__main__":
    main()

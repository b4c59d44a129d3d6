"""Kill clients, kill stores, and let many clients crowd a small pool.

`python -m tests.torture.store --kill-clients 300 --kill-stores 100 --churn-s 600`
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sllmctl.store.client import StoreClient
from tests.conftest import write_checkpoint
from tests.store.conftest import RunningStore
from tests.torture.store_client import digest_of_files, digest_through_store

MIB = 2**20
MODEL_MIB = 12


def make_models(storage: Path, count: int) -> list[Path]:
    """Models of random bytes, 12 MiB each in two shards."""
    import torch

    models = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        rows = MODEL_MIB * MIB // 2 // 1024
        tensors = [
            {f"t{i}": torch.randint(-128, 127, (rows + i, 1024), generator=generator).char()}
            for i in range(2)
        ]
        shards = {f"model-0000{i + 1}-of-00002.safetensors": t for i, t in enumerate(tensors)}
        models.append(write_checkpoint(storage / f"m{number}", shards))
    return models


def start_client(store: RunningStore, models: list[Path], loads: int = 10**6) -> subprocess.Popen:
    """A client process that loads models at random."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.torture.store_client", str(store.socket), *map(str, models)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLLM_LOADS": str(loads)},
    )


def check_lines(text: str) -> int:
    """Every whole line must say ok; how many did."""
    lines = text.splitlines()[: text.count("\n")]
    wrong = [line for line in lines if not line.startswith("ok ")]
    assert not wrong, wrong[:3]
    return len(lines)


def settled(store: RunningStore) -> dict[str, object]:
    """The status once nobody loads: leases gone within a second, nothing orphaned, sums exact."""
    time.sleep(1.0)
    status = store.status()
    assert status["leases"] == [], status["leases"]
    store.wait_for(lambda s: all(m["state"] != "loading" for m in s["models"]))
    status = store.wait_for(lambda s: s["pool"]["orphaned_bytes"] == 0)
    pool = status["pool"]
    unit = pool["segment_bytes"]
    held = sum(-(-m["warm_bytes"] // unit) for m in status["models"])
    assert held * unit <= pool["used_bytes"] <= pool["bytes"], pool
    with StoreClient(store.socket) as client:
        assert client.ask({"op": "evict", "name": None})["kept"] == []
    assert store.status()["pool"]["used_bytes"] == 0
    return status


def anonymous_bytes(store: RunningStore) -> int:
    """Memory of the store's own, the pool left out."""
    text = Path(f"/proc/{store.process.pid}/status").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def kill_clients(directory: Path, count: int, seed: int = 1) -> str:
    """Kill -9 clients at random instants."""
    store = RunningStore(directory, pool=f"{4 * MODEL_MIB}MiB")
    models = make_models(store.storage, 6)
    generator = random.Random(seed)
    loads = 0
    try:
        for _ in range(count):
            client = start_client(store, models)
            time.sleep(generator.uniform(0.15, 0.6))
            client.kill()
            loads += check_lines(client.communicate()[0])
        settled(store)
        for model in models:
            assert digest_through_store(store.socket, model)[0] == digest_of_files(model)
        descriptors = store.open_descriptors(segments=True)
        settled(store)
    finally:
        assert store.end() == 0
    return f"{count} clients killed after {loads} loads; {descriptors} descriptors at the end"


def kill_stores(directory: Path, count: int, seed: int = 2) -> str:
    """Kill -9 the store at random instants while clients load."""
    generator = random.Random(seed)
    loads = 0
    store = RunningStore(directory, pool=f"{4 * MODEL_MIB}MiB")
    models = make_models(store.storage, 6)
    for _ in range(count):
        clients = [start_client(store, models, loads=12) for _ in range(2)]
        time.sleep(generator.uniform(0.1, 0.7))
        store.end(signal.SIGKILL)
        for client in clients:
            output, _ = client.communicate(timeout=120)
            assert client.returncode == 0, client.returncode
            assert check_lines(output) == 12
            loads += 12
        store = RunningStore(directory, pool=f"{4 * MODEL_MIB}MiB")
    assert store.end() == 0
    return f"the store killed {count} times during {loads} loads, every one of them right"


def churn(directory: Path, seconds: float, clients: int = 64) -> str:
    """Many clients load 8 models in random order through a pool that holds 3."""
    store = RunningStore(directory, pool=f"{3 * (MODEL_MIB + 4)}MiB")
    models = make_models(store.storage, 8)
    settled(store)
    before, before_bytes = store.open_descriptors(segments=True), anonymous_bytes(store)
    running = [start_client(store, models) for _ in range(clients)]
    outputs = []
    try:
        time.sleep(seconds)
        for client in running:
            client.send_signal(signal.SIGKILL)
        outputs = [check_lines(client.communicate()[0]) for client in running]
        settled(store)
        after, after_bytes = store.open_descriptors(segments=True), anonymous_bytes(store)
    finally:
        for client in running:
            client.kill()
        assert store.end() == 0
    assert min(outputs) > 0, "a client never got a load through"
    return (
        f"{clients} clients, {sum(outputs)} loads in {seconds:.0f} s, "
        f"{min(outputs)} to {max(outputs)} each; descriptors {before} before, {after} after; "
        f"{before_bytes / 1e6:.1f} MB of the store's own before, {after_bytes / 1e6:.1f} MB after"
    )


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kill-clients", type=int, default=0)
    parser.add_argument("--kill-stores", type=int, default=0)
    parser.add_argument("--churn-s", type=float, default=0)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    for run, amount in ((kill_clients, options.kill_clients), (kill_stores, options.kill_stores)):
        if amount:
            with tempfile.TemporaryDirectory() as directory:
                print(run(Path(directory), amount), flush=True)
    if options.churn_s:
        with tempfile.TemporaryDirectory() as directory:
            print(churn(Path(directory), options.churn_s, options.clients), flush=True)


if __name__ == "__main__":
    main()

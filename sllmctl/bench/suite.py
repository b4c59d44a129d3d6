"""The rows of a benchmark: interleaved rounds of every case, and what must hold between them."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sllmctl.bench import cases
from sllmctl.bench.measure import Case, Row, Sample, make_cold, make_hot, run_forked
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.errors import SllmError
from sllmctl.store.client import StoreClient

INDEX_TENSORS = 100_000


@dataclass(frozen=True, slots=True)
class Budget:
    """A bound on a ratio of medians within one run."""

    text: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def held(self) -> bool | None:
        """Whether the bound holds; None where it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass(slots=True)
class Group:
    """Cases that are measured in turns, under the same condition."""

    title: str
    prepare: Callable[[], None]
    cases: Mapping[str, Case]
    pretouch_bytes: int = 0

    def run(self, rounds: int, note: Callable[[str], None]) -> dict[str, Row]:
        """Run every case once a round, in turns."""
        rows = {name: Row(name) for name in self.cases}
        for number in range(rounds):
            for name, case in self.cases.items():
                note(f"{self.title}: {name}, round {number + 1} of {rounds}")
                if rows[name].problem is not None:
                    continue
                try:
                    self.prepare()
                    sample = run_forked(case, pretouch_bytes=self.pretouch_bytes)
                    rows[name].samples.append(sample)
                except SllmError as exc:
                    rows[name].problem = str(exc)
        checks = {sample.check for row in rows.values() for sample in row.samples if sample.check}
        if len(checks) > 1:
            raise SllmError(f"{self.title}: the loaders do not agree on the bytes: {checks}")
        return rows


def load_groups(path: Path, torch_file: Path) -> list[Group]:
    """Loads of a checkpoint: cold, from the page cache, and into private memory."""
    shards = [shard.path for shard in open_checkpoint(path).shards]
    files = [*shards, torch_file]
    nbytes = sum(shard.stat().st_size for shard in shards)
    load = {
        "sllmctl": partial(cases.ours, path),
        "safetensors": partial(cases.safetensors_load, path),
        "torch.load mmap": partial(cases.torch_load, torch_file, mapped=True),
    }
    private = {
        "sllmctl --map never": partial(cases.ours, path, map_files="never"),
        "safetensors pread": partial(cases.safetensors_load, path, "pread"),
        "safetensors + clone": partial(cases.safetensors_load, path, "clone"),
        "torch.load": partial(cases.torch_load, torch_file, mapped=False),
    }
    return [
        Group(
            "cold",
            partial(make_cold, files),
            {"raw direct read": partial(cases.raw_direct, shards), **load},
            nbytes,
        ),
        Group(
            "page cache",
            partial(make_hot, files),
            {"plain read of memory": partial(cases.memory_read, nbytes), **load},
            nbytes,
        ),
        Group(
            "private copy",
            partial(make_hot, files),
            {"plain copy": partial(cases.plain_copy, nbytes), **private},
            2 * nbytes,
        ),
    ]


def store_groups(path: Path, socket: Path) -> list[Group]:
    """Loads through a store: the first, beside a direct one, and warm ones, beside safetensors."""
    shards = [shard.path for shard in open_checkpoint(path).shards]
    nbytes = sum(shard.stat().st_size for shard in shards)
    via_store = partial(cases.through_store, path, socket)

    def empty_and_cold() -> None:
        with StoreClient(socket) as client:
            client.ask({"op": "evict", "name": None})
        make_cold(shards)

    def warm_and_cold() -> None:
        run_forked(via_store)
        make_cold(shards)

    return [
        Group(
            "first load",
            empty_and_cold,
            {"sllmctl through the store": via_store, "sllmctl direct": partial(cases.ours, path)},
            nbytes,
        ),
        Group(
            "warm, page cache empty",
            warm_and_cold,
            {
                "sllmctl through the store": via_store,
                "safetensors": partial(cases.safetensors_load, path),
            },
            nbytes,
        ),
    ]


@contextmanager
def running_store(directory: Path, nbytes: int) -> Iterator[Path]:
    """A store whose pool holds so many bytes, with its pages supplied; its socket."""
    socket = directory / "store.sock"
    pool_bytes = str(nbytes + max(nbytes // 2, 64 * 2**20))
    command = [sys.executable, "-m", "sllmctl", "serve", "--mem-pool-size", pool_bytes]
    process = subprocess.Popen(
        [*command, "--socket", str(socket)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready"):
                break
        while True:
            with StoreClient(socket) as client:
                pool = client.ask({"op": "status"})["pool"]
            if pool["prefaulted_bytes"] >= pool["bytes"]:
                break
            time.sleep(0.2)
        yield socket
    finally:
        process.terminate()
        process.wait()


def convert_group(path: Path) -> Group:
    """Conversion beside `cp`, from a cold source."""
    shards = [shard.path for shard in open_checkpoint(path).shards]
    target = path.parent / f".{path.name}.bench"

    def clean() -> None:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        make_cold(shards)

    return Group(
        "convert",
        clean,
        {
            "cp + fsync": partial(cases.copy_files, shards, target),
            "convert --no-verify": partial(cases.convert_checkpoint, path, target, verify=False),
            "convert": partial(cases.convert_checkpoint, path, target, verify=True),
        },
    )


def start_group(directory: Path) -> Group:
    """What every command pays: the index of many tensors, and the start of the process."""
    index = directory / "many.safetensors"
    _write_index(index)
    return Group(
        "start",
        lambda: None,
        {
            "index of 100,000 tensors": partial(_read_index, index),
            "sllmctl --help": _help,
            "python -c pass": _nothing,
        },
    )


def _write_index(path: Path) -> None:
    header = {
        f"model.layers.{i // 100}.mlp.experts.{i % 100}.weight": {
            "dtype": "BF16",
            "shape": [2, 2],
            "data_offsets": [8 * i, 8 * i + 8],
        }
        for i in range(INDEX_TENSORS)
    }
    raw = json.dumps(header, separators=(",", ":")).encode()  # as safetensors writes it
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 8 * INDEX_TENSORS)


def _read_index(path: Path) -> Sample:
    started = time.perf_counter()
    checkpoint = open_checkpoint(path)
    elapsed = time.perf_counter() - started
    if len(checkpoint.tensors) != INDEX_TENSORS:
        raise SllmError(f"{len(checkpoint.tensors)} tensors in the index")
    return Sample(elapsed)


def _run(*arguments: str) -> Sample:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return Sample(time.perf_counter() - started)


def _help() -> Sample:
    return _run("-m", "sllmctl", "--help")


def _nothing() -> Sample:
    return _run("-c", "pass")


def budgets(rows: dict[str, dict[str, Row]]) -> Iterator[Budget]:
    """The bounds that the measured groups are held to."""

    def ratio(group: str, ours: str, theirs: str, what: str = "ready_s") -> float | None:
        pair = [rows.get(group, {}).get(name) for name in (ours, theirs)]
        values = [row.median(what) if row is not None else None for row in pair]
        return values[0] / values[1] if values[0] is not None and values[1] else None

    def inverse(value: float | None) -> float | None:
        return 1 / value if value else None

    cold = inverse(ratio("cold", "sllmctl", "raw direct read"))
    yield Budget("cold load / raw direct read, as rates", cold, 0.95, True)
    hot = ratio("page cache", "sllmctl", "safetensors")
    yield Budget("page cache: ready / safetensors", hot, 0.5, False)
    touched = ratio("page cache", "sllmctl", "safetensors", "all_s")
    yield Budget("page cache: every byte read / safetensors", touched, 0.6, False)
    copy = inverse(ratio("private copy", "sllmctl --map never", "plain copy"))
    yield Budget("private copy / plain two-thread copy, as rates", copy, 0.8, True)
    first = ratio("first load", "sllmctl through the store", "sllmctl direct")
    yield Budget("first load: through the store / direct", first, 1.05, False)
    convert = inverse(ratio("convert", "convert --no-verify", "cp + fsync"))
    yield Budget("convert --no-verify / cp + fsync, as rates", convert, 0.9, True)
    for name in ("convert --no-verify", "convert"):
        row = rows.get("convert", {}).get(name)
        peak = row.median("peak_bytes") if row is not None else None
        yield Budget(f"{name}: peak memory in MiB", peak and peak / 2**20, 512, False)
    for name, bound in (("index of 100,000 tensors", 0.3), ("sllmctl --help", 0.25)):
        row = rows.get("start", {}).get(name)
        yield Budget(f"{name}, s", row.median("ready_s") if row is not None else None, bound, False)


def spread(row: Row) -> tuple[float, float] | None:
    """Fastest and slowest sample."""
    times = [sample.ready_s for sample in row.samples]
    return (min(times), max(times)) if times else None


def deviation(row: Row) -> float:
    """Median absolute deviation from the median, as a part of it."""
    times = [sample.ready_s for sample in row.samples]
    if not times:
        return 0.0
    middle = statistics.median(times)
    return statistics.median(abs(value - middle) for value in times) / middle


@contextmanager
def torch_copy(path: Path) -> Iterator[Path]:
    """The same tensors as `torch.save` writes them; gone afterwards."""
    target = cases.save_for_torch(path)
    try:
        yield target
    finally:
        shutil.rmtree(target.parent)

"""``--mode load``: every way to load one checkpoint, by the state that the machine is in."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sllmctl.bench import limits, ways
from sllmctl.bench.measure import Sample, cpu_seconds, run_forked
from sllmctl.bench.pagecache import PageCache
from sllmctl.bench.rows import Case, Group, deadline_s
from sllmctl.bench.stores import IDLE_LEASES, Store, idle_leases
from sllmctl.bench.ways import Subject, Way
from sllmctl.errors import SllmError

INDEX_TENSORS = 100_000
RAW, THROUGH_CACHE, COPY, READ = (
    "raw direct read",
    "plain read of the page cache",
    "plain copy, 2 threads",
    "plain read of memory",
)
PINNED = "pinned memory to device"
COLD, CACHED, PRIVATE, FIRST, WARM, LEASES, CONVERT, START = (
    "cold",
    "page cache",
    "private copy",
    "first load",
    "warm",
    "idle leases",
    "convert",
    "start",
)
GROUPS = (COLD, CACHED, PRIVATE, FIRST, WARM, LEASES, CONVERT, START)
STORE_GROUPS = (FIRST, WARM, LEASES)
CP, CONVERT_ONLY, CONVERT_VERIFY = "cp + fsync", "convert --no-verify", "convert"
INDEX, HELP, TYPER, NOTHING = (
    "index of 100,000 tensors",
    "sllmctl --help",
    "python -c 'import typer'",
    "python -c pass",
)
NO_LEASES, MANY_LEASES = "no other lease", f"{IDLE_LEASES:,} idle leases"


# What a process has as its peak includes that of the one that started it: ours is large.
_PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(done.returncode)
"""
_OPEN = """
import sys, time
from pathlib import Path
from sllmctl.core.checkpoint import open_checkpoint
started = time.perf_counter()
checkpoint = open_checkpoint(Path(sys.argv[1]))
print(time.perf_counter() - started, len(checkpoint.tensors))
"""


def disk_groups(subject: Subject, cache: PageCache) -> list[Group]:
    """Loads without a store: from the disk, from the page cache, and into private memory."""
    nbytes = subject.file_bytes
    on_cpu = subject.device == "cpu"
    link = [] if on_cpu else [_link(subject)]
    everything = [ways.OURS, ways.OURS_MODEL, *ways.PEERS]
    private = [ways.OURS_COPY, *ways.PRIVATE_PEERS]
    raw = Case(
        RAW,
        "limit",
        partial(limits.raw_direct, subject.shards),
        partial(cache.make_cold, subject.shards),
    )
    through = Case(
        THROUGH_CACHE,
        "limit",
        partial(limits.through_page_cache, subject.shards),
        partial(cache.make_hot, subject.shards),
    )
    read = Case(READ, "limit", partial(limits.memory_read, nbytes), pretouch_bytes=nbytes)
    copy = Case(COPY, "limit", partial(limits.plain_copy, nbytes), pretouch_bytes=2 * nbytes)
    groups = [
        Group(
            COLD,
            "How long does a load take when nothing of the checkpoint is in memory?",
            "all_s",
            [raw, *link, *_cases(everything, subject, cache.make_cold)],
            nbytes,
            (RAW, *(case.name for case in link)),
        ),
        Group(
            CACHED,
            "How long does a load take when all of the checkpoint is in the page cache?",
            "all_s",
            [
                *([read] if on_cpu else link),
                through,
                *_cases(everything, subject, cache.make_hot, cached=True),
            ],
            nbytes,
            (READ,) if on_cpu else (PINNED,),
        ),
    ]
    if on_cpu:
        title = "How long does a load into private memory take, with the page cache full?"
        cases = [copy, *_cases(private, subject, cache.make_hot, cached=True)]
        groups.append(Group(PRIVATE, title, "ready_s", cases, nbytes, (COPY,), ways.PREAD.name))
    return groups


def store_groups(subject: Subject, cache: PageCache, store: Store) -> list[Group]:
    """Loads through a store, with the page cache empty: the first, later ones, and crowded ones."""
    subject = replace(subject, socket=store.socket)
    shards, nbytes = subject.shards, subject.file_bytes
    on_cpu = subject.device == "cpu"
    link = [] if on_cpu else [_link(subject)]
    raw = Case(RAW, "limit", partial(limits.raw_direct, shards), partial(cache.make_cold, shards))
    read = Case(READ, "limit", partial(limits.memory_read, nbytes), pretouch_bytes=nbytes)

    def empty_store(_: Sequence[Path]) -> None:
        store.empty()
        cache.make_cold(shards)

    def warm_store(_: Sequence[Path]) -> None:
        if store.warm_fraction(subject.path.name, nbytes) < 1:
            run_forked(
                partial(ways.OURS_STORE.sample, subject),
                deadline_s=deadline_s(nbytes),
            )
        cache.make_cold(shards)

    first = _cases([ways.OURS_STORE], subject, empty_store, store=store)
    later = _cases([ways.OURS_STORE], subject, warm_store, store=store)
    others = _cases([ways.OURS, ways.SAFETENSORS], subject, cache.make_cold)
    groups = [
        Group(
            FIRST,
            "What does the first load through the store cost, which fills it?",
            "all_s",
            [raw, *link, *first, *others],
            nbytes,
            (RAW, *(case.name for case in link)),
        ),
        Group(
            WARM,
            "What does every later load through the store cost, with the page cache empty?",
            "all_s",
            [*([read] if on_cpu else link), *later, *others],
            nbytes,
            (READ,) if on_cpu else (PINNED,),
        ),
    ]
    if on_cpu:
        leases = {NO_LEASES: 0, MANY_LEASES: IDLE_LEASES}
        cases = [
            Case(
                name,
                "ours",
                partial(idle_leases, subject, store, count),
                partial(warm_store, shards),
            )
            for name, count in leases.items()
        ]
        question = "Do idle leases make a warm load slower, and what memory do they take?"
        groups.append(Group(LEASES, question, "ready_s", cases, 0, (), NO_LEASES))
    return groups


def _link(subject: Subject) -> Case:
    run = partial(limits.pinned_to_device, subject.file_bytes, subject.device)
    return Case(PINNED, "limit", run)


def _cases(
    chosen: Sequence[Way],
    subject: Subject,
    prepare: Callable[[Sequence[Path]], None],
    *,
    cached: bool = False,
    store: Store | None = None,
) -> list[Case]:
    """A row a way.

    Args:
        chosen: The ways.
        subject: What they load.
        prepare: Brings a way's files into the state that is measured.
        cached: That is the page cache, and is brought about once more after memory was touched,
            which may have taken some of it.
        store: Whose work is part of theirs.
    """
    return [
        Case(
            way.name,
            way.kind,
            partial(_sample, way, subject, prepare if cached else None, store),
            partial(prepare, way.files(subject)),
            ways.version_of(way.package),
            way.problem(subject),
            way.own_bytes(subject, cached=cached),
            may_differ=way in (ways.OURS_MODEL, ways.FROM_PRETRAINED),
        )
        for way in chosen
    ]


def _sample(
    way: Way,
    subject: Subject,
    again: Callable[[Sequence[Path]], None] | None,
    store: Store | None,
) -> Sample:
    if again is not None:
        again(way.files(subject))
    if store is not None:
        return store.with_its_work(partial(way.sample, subject))
    return way.sample(subject)


def convert_group(subject: Subject, cache: PageCache) -> Group:
    """Conversion beside `cp`, from a cold source to the same disk."""
    target = subject.scratch / "converted"

    def clean() -> None:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()  # or the disk is still busy with what the sample before wrote
        cache.make_cold(subject.shards)

    convert = partial(_convert, subject.path, target)
    cases = [
        Case(CP, "limit", partial(_copy_files, subject.shards, target)),
        Case(CONVERT_ONLY, "ours", partial(convert, verify=False)),
        Case(CONVERT_VERIFY, "ours", partial(convert, verify=True)),
    ]
    # The page cache of what `cp` writes, and the buffers of a conversion.
    memory_bytes = 2 * subject.file_bytes
    cases = [replace(case, prepare=clean, pretouch_bytes=memory_bytes) for case in cases]
    question = "How long does a conversion take, beside a plain copy of the files?"
    return Group(CONVERT, question, "ready_s", cases, subject.file_bytes, (CP,), CP)


def _copy_files(paths: Sequence[Path], target: Path) -> Sample:
    started = time.perf_counter()
    target.mkdir()
    subprocess.run(["cp", *map(str, paths), str(target)], check=True)
    for path in paths:
        fd = os.open(target / path.name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    elapsed = time.perf_counter() - started
    return Sample(elapsed, cpu_s=cpu_seconds(resource.RUSAGE_CHILDREN))


def _convert(path: Path, target: Path, *, verify: bool) -> Sample:
    command = [sys.executable, "-m", "sllmctl", "convert", str(path), "--output", str(target)]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *command, "--json", *([] if verify else ["--no-verify"])],
        capture_output=True,
        text=True,
    )
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        raise SllmError(lines[0].removeprefix("error: "))
    peak = int(lines[-1]) * 1024
    # Without the interpreter's start, as `cp` has none to speak of.
    elapsed: float = json.loads(done.stdout)["elapsed_s"]
    return Sample(elapsed, cpu_s=cpu_seconds(resource.RUSAGE_CHILDREN), peak_bytes=peak)


def start_group(scratch: Path) -> Group:
    """What every command pays: the index of many tensors, and the start of the process."""
    index = scratch / "many.safetensors"
    write_index(index)
    cases = [
        Case(INDEX, "ours", partial(_read_index, index)),
        Case(HELP, "ours", partial(_run, "-m", "sllmctl", "--help")),
        Case(TYPER, "limit", partial(_run, "-c", "import typer")),
        Case(NOTHING, "limit", partial(_run, "-c", "pass")),
    ]
    question = "What does a command cost before it does anything?"
    return Group(START, question, "ready_s", cases, 0, (), NOTHING)


def write_index(path: Path, tensors: int = INDEX_TENSORS) -> None:
    """Write a file of many tiny tensors, as safetensors writes it; its data is a hole."""
    header = {
        f"model.layers.{i // 100}.mlp.experts.{i % 100}.weight": {
            "dtype": "BF16",
            "shape": [2, 2],
            "data_offsets": [8 * i, 8 * i + 8],
        }
        for i in range(tensors)
    }
    raw = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 8 * tensors)


def _read_index(path: Path) -> Sample:
    command = [sys.executable, "-c", _OPEN, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    elapsed, tensors = done.stdout.split()
    if int(tensors) != INDEX_TENSORS:
        raise SllmError(f"{tensors} tensors in the index")
    return Sample(float(elapsed), cpu_s=cpu_seconds(resource.RUSAGE_CHILDREN))


def _run(*arguments: str) -> Sample:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    elapsed = time.perf_counter() - started
    return Sample(elapsed, cpu_s=cpu_seconds(resource.RUSAGE_CHILDREN))

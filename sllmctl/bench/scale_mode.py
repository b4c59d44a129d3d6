"""``--mode scale``: more processes at once, more bytes, more tensors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from sllmctl.bench import ways
from sllmctl.bench.measure import Forked, Sample, settle
from sllmctl.bench.plain import write_plain
from sllmctl.bench.room import check_room, free_bytes, spare_memory_bytes
from sllmctl.bench.rows import Bench, Case, Group, deadline_s
from sllmctl.bench.stores import Store, pool_for, running_store
from sllmctl.bench.ways import Subject, Way
from sllmctl.core.units import format_size
from sllmctl.errors import SllmError

SIZES = (10**7, 10**8, 10**9, 8 * 10**9)
TENSORS = (100, 1_000, 10_000, 100_000)
MAX_PROCESSES = 8
_TENSORS_OF_A_SIZE = 300
_BYTES_OF_A_COUNT = 10**8
_LARGEST = 8
"""The largest checkpoint is so many times the one that was asked for."""

_WAYS = (ways.OURS, ways.SAFETENSORS)
_FULL, _EMPTY = "page cache full", "page cache empty"


def groups(bench: Bench, subject: Subject) -> Iterator[Group]:
    """All groups of the mode."""
    scratch = subject.scratch / "scale"
    yield from _processes(bench, subject, scratch)
    yield from _bytes(bench, subject, scratch)
    yield _tensors(bench, subject, scratch)


# ---- processes ---------------------------------------------------------------------------------


def process_counts(cores: int) -> list[int]:
    """1, 2, 4 … up to twice the cores, and not beyond what tells something."""
    most = min(MAX_PROCESSES, 2 * cores)
    return [count for count in (1, 2, 4, 8) if count <= most]


def _processes(bench: Bench, subject: Subject, scratch: Path) -> Iterator[Group]:
    counts = process_counts(len(os.sched_getaffinity(0)))
    nbytes = subject.file_bytes // counts[-1]
    check_room(subject.scratch, counts[-1] * nbytes)
    bench.note("writing a checkpoint for every process")
    models = [
        write_plain(scratch / f"process-{i}", nbytes, _TENSORS_OF_A_SIZE, seed=i)
        for i in range(counts[-1])
    ]
    for own, what in ((False, "the same checkpoint"), (True, "a checkpoint each")):
        for state in (_FULL, _EMPTY):
            group = Group(
                f"processes, {what}, {state}",
                f"When processes load {what} of {format_size(nbytes)} at once, with the "
                f"{state}: how long does it take until the last of them has it?",
                "all_s",
                [],
                mode="scale",
                ranked=False,
            )
            with ExitStack() as stack:
                store: Store | None = None
                if not own and state == _EMPTY:
                    try:
                        store = stack.enter_context(running_store(pool_for(nbytes)))
                    except SllmError as exc:
                        group.problem = f"loads through a store: {exc}"
                for count in counts:
                    chosen = models[:count] if own else models[:1] * count
                    subjects = [replace(subject, path=path) for path in chosen]
                    group.cases += [_together(bench, way, subjects, state) for way in _WAYS]
                    if store is not None:
                        group.cases.append(_through(bench, store, subjects))
                yield bench.measure(group)


def _through(bench: Bench, store: Store, subjects: Sequence[Subject]) -> Case:
    """All through a store that has nothing yet, and reads for them once."""

    def empty() -> None:
        store.empty()
        bench.cache.make_cold(subjects[0].shards)

    through = [replace(subject, socket=store.socket) for subject in subjects]
    case = _together(bench, ways.OURS_STORE, through, _EMPTY)
    return replace(case, prepare=empty, run=partial(store.with_its_work, case.run))


def _together(bench: Bench, way: Way, subjects: Sequence[Subject], state: str) -> Case:
    files = [path for one in {one.path: one for one in subjects}.values() for path in one.shards]
    put = bench.cache.make_hot if state == _FULL else bench.cache.make_cold
    nbytes = sum(subject.file_bytes for subject in subjects)
    what = f"{len(subjects)} process{'es' if len(subjects) > 1 else ''}"
    return Case(
        f"{way.name}, {what}",
        way.kind,
        partial(load_together, way, subjects, state == _FULL),
        partial(put, files),
        ways.version_of(way.package),
        way.problem(subjects[0]),
        bytes_of=what,
        extra_s=deadline_s(nbytes),  # beyond the one in which it gives up by itself
    )


def load_together(way: Way, subjects: Sequence[Subject], cached: bool) -> Sample:
    """Load in as many processes at once.

    Returns:
        From their common start until the last of them was ready, and had read every byte; the
        memory that none shares, and the work, of all; a digest of everything.

    Raises:
        SllmError: One of them failed.
    """
    start_reader, start_writer = os.pipe()
    ready_reader, ready_writer = os.pipe()

    def wait_and_load(subject: Subject) -> Sample:
        os.close(start_writer)
        settle(way.own_bytes(subject, cached=cached))
        os.write(ready_writer, b".")
        os.read(start_reader, 1)  # ends when nobody can write any more
        sample = way.sample(subject)
        end = time.perf_counter()  # one clock for all processes
        return replace(sample, ready_s=end - ((sample.all_s or 0) - sample.ready_s), all_s=end)

    deadline = time.monotonic() + deadline_s(sum(subject.file_bytes for subject in subjects))
    with ExitStack() as stack:
        children = [
            stack.enter_context(Forked(partial(wait_and_load, subject), leads=False))
            for subject in subjects
        ]
        os.close(ready_writer)
        os.close(start_reader)
        left = len(children)
        while left and (said := len(os.read(ready_reader, left))):
            left -= said
        os.close(ready_reader)
        started = time.perf_counter()
        os.close(start_writer)
        samples = [child.result(deadline) for child in children]
    checks = [sample.check or "" for sample in samples]
    if len({subject.path for subject in subjects}) == 1 < len(set(checks)):
        raise SllmError("processes that load the same checkpoint have different bytes")
    return Sample(
        max(sample.ready_s for sample in samples) - started,
        max(sample.all_s or 0 for sample in samples) - started,
        cpu_s=sum(sample.cpu_s for sample in samples),
        private_bytes=sum(sample.private_bytes for sample in samples),
        disk_bytes=sum(sample.disk_bytes for sample in samples),
        check=" ".join(checks),
    )


# ---- bytes and tensors -------------------------------------------------------------------------


def sizes_up_to(largest: int, free_disk: int, free_memory: int) -> list[int]:
    """Sizes to measure: those that fit on the disk, and thrice into memory (see `own_bytes`)."""
    most = min(largest, free_disk, free_memory // 3)
    return [size for size in SIZES if size <= most] or [SIZES[0]]


def _bytes(bench: Bench, subject: Subject, scratch: Path) -> Iterator[Group]:
    sizes = sizes_up_to(
        _LARGEST * subject.file_bytes, free_bytes(subject.scratch) // 2, spare_memory_bytes()
    )
    check_room(subject.scratch, sum(sizes))
    models = {}
    for size in sizes:
        bench.note(f"writing a checkpoint of {format_size(size)}")
        models[size] = write_plain(scratch / f"bytes-{size}", size, _TENSORS_OF_A_SIZE)
    for state in (_FULL, _EMPTY):
        cases = [
            _alone(bench, way, replace(subject, path=path), state, format_size(size))
            for size, path in models.items()
            for way in _WAYS
        ]
        question = f"How does a load grow with the bytes, with the {state}?"
        group = Group(f"bytes, {state}", question, "all_s", cases, mode="scale", ranked=False)
        yield bench.measure(group)


def _tensors(bench: Bench, subject: Subject, scratch: Path) -> Group:
    check_room(subject.scratch, len(TENSORS) * _BYTES_OF_A_COUNT)
    cases = []
    for count in TENSORS:
        path = write_plain(scratch / f"tensors-{count}", _BYTES_OF_A_COUNT, count)
        one = replace(subject, path=path)
        cases += [_alone(bench, way, one, _FULL, f"{count:,} tensors") for way in _WAYS]
    return bench.measure(
        Group(
            "tensors",
            f"How does a load grow with the number of tensors, at {format_size(_BYTES_OF_A_COUNT)} "
            f"and with the {_FULL}?",
            "ready_s",
            cases,
            mode="scale",
            ranked=False,
        )
    )


def _alone(bench: Bench, way: Way, subject: Subject, state: str, what: str) -> Case:
    put = bench.cache.make_hot if state == _FULL else bench.cache.make_cold
    return Case(
        f"{way.name}, {what}",
        way.kind,
        partial(way.sample, subject),
        partial(put, subject.shards),
        ways.version_of(way.package),
        way.problem(subject),
        way.own_bytes(subject, cached=state == _FULL),
        bytes_of=what,
        extra_s=deadline_s(subject.file_bytes),
    )

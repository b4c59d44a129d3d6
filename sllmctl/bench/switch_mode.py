"""``--mode switch``: a queue of models through one pool, and what each switch costs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sllmctl.bench import ways
from sllmctl.bench.generate import make_qwen3
from sllmctl.bench.room import check_room, spare_memory_bytes
from sllmctl.bench.rows import Bench, Case, Group, Row
from sllmctl.bench.stores import Store, running_store
from sllmctl.bench.ways import Subject, Way
from sllmctl.core.units import format_size
from sllmctl.errors import ConfigError, SllmError
from sllmctl.store.pool import choose_segment_bytes

GENERATED_MODELS = 3
_QUEUE_SEED = 11
_FAVOURITE = 0.5
"""How often the next model is the one that is asked for most."""


def queue(models: int, length: int) -> list[int]:
    """Which model comes when: never the same twice in a row, the first more often than others."""
    order = random.Random(_QUEUE_SEED)
    chosen = [0]
    while len(chosen) < length:
        others = [model for model in range(models) if model != chosen[-1]]
        favourite = others[0] == 0 and order.random() < _FAVOURITE
        chosen.append(0 if favourite else order.choice(others))
    return chosen


def groups(
    bench: Bench, subject: Subject, paths: Sequence[Path], size_bytes: int
) -> Iterator[Group]:
    """Switches without a store, and with pools of several sizes, the page cache always empty.

    Args:
        bench: The run.
        subject: Where to load to, and where to write.
        paths: The models; fewer than two stand for generated ones.
        size_bytes: Of a generated one.

    Raises:
        ConfigError: The disk has no room for the models.
    """
    subjects = list(_subjects(bench, subject, paths, size_bytes))
    sizes = [one.file_bytes for one in subjects]
    order = queue(len(subjects), bench.rounds * len(subjects))
    group = Group(
        "switch",
        f"What does a switch to another of {len(subjects)} models cost, by the size of the pool, "
        "when the page cache has none of them?",
        "all_s",
        [],
        sum(sizes[number] for number in order) // len(order),
        mode="switch",
    )
    for way in (ways.SAFETENSORS, ways.OURS):
        group.rows.append(_play(bench, subjects, order, way, way.name))
    for count in range(len(subjects) + 1):
        # The largest ones, and a segment each that is only partly used.
        wanted = sum(sorted(sizes)[-count:]) if count else max(sizes) // 2
        pool_bytes = wanted + len(subjects) * choose_segment_bytes(wanted)
        group.rows.append(_through_pool(bench, subjects, order, pool_bytes, count))
    expected = [sample.check for sample in group.rows[1].samples]
    for row in group.rows:
        if not row.problem and [sample.check for sample in row.samples] != expected:
            row.problem = "its bytes are not those of the files"
            row.samples.clear()
    yield group


def _subjects(
    bench: Bench, subject: Subject, paths: Sequence[Path], size_bytes: int
) -> Iterator[Subject]:
    if len(paths) > 1:
        yield from (replace(subject, path=path) for path in paths)
        return
    yield subject
    nbytes = subject.file_bytes if paths else size_bytes
    check_room(subject.scratch, (GENERATED_MODELS - 1) * nbytes)
    for seed in range(1, GENERATED_MODELS):
        bench.note(f"generating another checkpoint of {format_size(nbytes)}")
        path = subject.scratch / f"switch-{seed}"
        make_qwen3(path, nbytes, seed=seed)
        yield replace(subject, path=path)


def _through_pool(
    bench: Bench, subjects: Sequence[Subject], order: Sequence[int], pool_bytes: int, count: int
) -> Row:
    whole = f"{count} of {len(subjects)} models" if count else "half a model"
    name = f"store, a pool for {whole}"
    if pool_bytes > spare_memory_bytes():
        return Row(name, "ours", problem=f"no memory for a pool of {format_size(pool_bytes)}")
    try:
        with running_store(pool_bytes) as store:
            through = [replace(one, socket=store.socket) for one in subjects]
            return _play(bench, through, order, ways.OURS_STORE, name, store)
    except (SllmError, ConfigError) as exc:
        return Row(name, "ours", problem=str(exc))


def _play(
    bench: Bench,
    subjects: Sequence[Subject],
    order: Sequence[int],
    way: Way,
    name: str,
    store: Store | None = None,
) -> Row:
    """Load one model after the other; one row of all switches."""
    row = Row(name, way.kind, ways.version_of(way.package), way.problem(subjects[0]))
    files = [path for one in subjects for path in one.shards]
    warm = 0.0
    for number, index in enumerate(order):
        bench.note(f"switch {number + 1} of {len(order)}: {name}")
        one = subjects[index]
        if store is not None and not row.problem:
            warm += store.warm_fraction(one.path.name, one.file_bytes)
        case = Case(
            name,
            way.kind,
            partial(way.sample, one),
            partial(bench.cache.make_cold, files),
            pretouch_bytes=one.file_bytes if store is None else 0,
        )
        bench.sample(case, row, one.file_bytes)
    if store is not None:
        row.note = f"{warm / len(order):.0%} of what was asked for was in the pool"
    return row

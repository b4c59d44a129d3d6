"""``--mode switch``: a queue of models through one pool, and what each switch costs."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from sllmctl.bench import ways
from sllmctl.bench.generate import make_qwen3
from sllmctl.bench.room import check_room, spare_memory_bytes
from sllmctl.bench.rows import Bench, Case, Group, Row
from sllmctl.bench.stores import Store, running_store
from sllmctl.bench.ways import Subject, Way
from sllmctl.core.units import format_seconds, format_size
from sllmctl.errors import ConfigError, SllmError
from sllmctl.store.pool import choose_segment_bytes

GENERATED_MODELS = 3
_WAYS = (ways.SAFETENSORS, ways.OURS)
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
    with ExitStack() as stack:
        players = [_Player(Row(way.name, way.kind), way, subjects) for way in _WAYS]
        for count in range(len(subjects) + 1):
            # The largest ones, and a segment each that is only partly used.
            wanted = sum(sorted(sizes)[-count:]) if count else max(sizes) // 2
            pool_bytes = wanted + len(subjects) * choose_segment_bytes(wanted)
            players.append(_through_pool(stack, subjects, pool_bytes, count))
        for number, index in enumerate(order):
            # In turn: what a disk gives changes by the minute.
            for player in bench.order.sample(players, len(players)):
                bench.note(f"switch {number + 1} of {len(order)}: {player.row.name}")
                player.switch_to(bench, index)
        for player in players:
            player.sum_up()
    group.rows = [player.row for player in players]
    expected = [sample.check for sample in players[1].row.samples]
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


@dataclass
class _Player:
    """A row, and what it needs for one switch more.

    Attributes:
        row: Of all its switches.
        way: How it loads.
        subjects: The models.
        store: What it loads through, or None.
        warm: For each switch, how much of the model the store had.
    """

    row: Row
    way: Way
    subjects: Sequence[Subject]
    store: Store | None = None
    warm: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.row.version = ways.version_of(self.way.package)
        self.row.problem = self.row.problem or self.way.problem(self.subjects[0])

    def switch_to(self, bench: Bench, index: int) -> None:
        """Load one of the models."""
        one, run = self.subjects[index], partial(self.way.sample, self.subjects[index])
        if self.row.problem:
            return
        if self.store is not None:
            try:
                self.warm.append(self.store.warm_fraction(one.path.name, one.file_bytes))
            except SllmError as exc:
                self.row.problem = str(exc)
                return
            run = partial(self.store.with_its_work, run)
        files = [path for subject in self.subjects for path in subject.shards]
        case = Case(
            self.row.name,
            self.way.kind,
            run,
            partial(bench.cache.make_cold, files),
            pretouch_bytes=self.way.own_bytes(one, cached=False),
        )
        bench.sample(case, self.row, one.file_bytes)

    def sum_up(self) -> None:
        """Say what a switch costs on average, and how much of it the pool saved."""
        took = self.row.values("all_s")
        if not took:
            return
        self.row.note = f"{format_seconds(statistics.mean(took))} a switch on average"
        if self.store is not None:
            had = statistics.mean(self.warm)
            self.row.note += f", and {had:.0%} of what was asked for was in the pool"


def _through_pool(
    stack: ExitStack, subjects: Sequence[Subject], pool_bytes: int, count: int
) -> _Player:
    whole = f"{count} of {len(subjects)} models" if count else "half a model"
    row = Row(f"store, a pool for {whole}", "ours")
    if pool_bytes > spare_memory_bytes():
        row.problem = f"no memory for a pool of {format_size(pool_bytes)}"
        return _Player(row, ways.OURS_STORE, subjects)
    try:
        store = stack.enter_context(running_store(pool_bytes))
    except (SllmError, ConfigError) as exc:
        row.problem = str(exc)
        return _Player(row, ways.OURS_STORE, subjects)
    through = [replace(one, socket=store.socket) for one in subjects]
    return _Player(row, ways.OURS_STORE, through, store)

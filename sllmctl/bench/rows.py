"""Rows of figures: cases measured in turns, in an order that is new in every round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sllmctl.bench.measure import Sample, run_forked
from sllmctl.bench.pagecache import PageCache
from sllmctl.bench.ways import Kind
from sllmctl.errors import SllmError

Measure = Literal["ready_s", "all_s"]
Note = Callable[[str], None]
_DEADLINE_S = 60.0
_SLOWEST_BYTES_PER_S = 20e6
_FIGURES = tuple(f.name for f in fields(Sample) if f.name not in ("check", "stages"))


@dataclass(frozen=True, slots=True)
class Case:
    """One row's measurement.

    Attributes:
        run: Takes a sample; in a forked child.
        prepare: Runs before each sample, in the parent.
        version: Of the library behind it.
        problem: Why it cannot run here, or "".
        pretouch_bytes: See `measure.run_forked`.
        bytes_of: What its digest is of; rows with the same word must agree.
        may_differ: Whether a digest of its own is no fault: what is built need not be what the
            file has.
        note: What a reader has to know about the row.
        extra_s: More time than a load may take.
    """

    name: str
    kind: Kind
    run: Callable[[], Sample]
    prepare: Callable[[], None] = field(default=lambda: None)
    version: str = ""
    problem: str = ""
    pretouch_bytes: int = 0
    bytes_of: str = "the file"
    may_differ: bool = False
    note: str = ""
    extra_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Middle and width of some samples."""

    median: float
    min: float
    q1: float
    q3: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; quartiles by linear interpolation."""
        q1, median, q3 = (
            statistics.quantiles(values, n=4, method="inclusive")
            if len(values) > 1
            else [values[0]] * 3
        )
        return cls(median, min(values), q1, q3, max(values))


@dataclass(slots=True)
class Row:
    """All samples of one case."""

    name: str
    kind: Kind
    version: str = ""
    problem: str = ""
    note: str = ""
    samples: list[Sample] = field(default_factory=list)

    def values(self, figure: str) -> list[float]:
        """A figure of every sample that has it."""
        return [v for v in (getattr(s, figure) for s in self.samples) if v is not None]

    def spread(self, figure: str) -> Spread | None:
        """The samples' middle and width; None where no sample has the figure."""
        values = self.values(figure)
        return Spread.of(values) if values else None

    def median(self, figure: str) -> float | None:
        """The samples' median; None where no sample has the figure."""
        spread = self.spread(figure)
        return spread.median if spread else None

    def document(self) -> dict[str, Any]:
        """As JSON: every figure's spread, then all samples."""
        spreads = {figure: self.spread(figure) for figure in _FIGURES}
        return {
            "name": self.name,
            "kind": self.kind,
            "version": self.version,
            "problem": self.problem,
            "note": self.note,
            "figures": {
                figure: {f.name: getattr(spread, f.name) for f in fields(Spread)}
                for figure, spread in spreads.items()
                if spread is not None
            },
            "samples": [
                {f.name: getattr(sample, f.name) for f in fields(Sample)} for sample in self.samples
            ],
        }


@dataclass(slots=True)
class Group:
    """Rows that answer one question, under one condition.

    Attributes:
        title: Short name, for ``--only``.
        question: What it answers, one sentence.
        measure: The figure that rows are sorted and compared by.
        nbytes: Bytes that a row moves, for rates; 0 where a rate makes no sense.
        limits: Rows of which the slowest is what no row can beat.
        reference: The row that others are compared with; where not ranked, the way: a row
            "WAY, HOW MANY" is compared with that way's row of as many.
        ranked: Whether rows are shown from the fastest to the slowest, or as they come.
        problem: Why none of it could be measured, or "".
    """

    title: str
    question: str
    measure: Measure
    cases: list[Case]
    nbytes: int = 0
    limits: tuple[str, ...] = ()
    reference: str = "safetensors"
    mode: str = "load"
    ranked: bool = True
    problem: str = ""
    rows: list[Row] = field(default_factory=list)

    def row(self, name: str) -> Row | None:
        """The row of a name."""
        return next((row for row in self.rows if row.name == name), None)

    def limit_s(self) -> float | None:
        """The slowest limit's median."""
        rows = [row for row in map(self.row, self.limits) if row is not None]
        medians = [value for row in rows if (value := row.median(self.measure)) is not None]
        return max(medians) if medians else None

    def in_order(self) -> Iterator[Row]:
        """Rows as they are shown; those without a figure last."""
        inf = float("inf")

        def key(row: Row) -> float:
            median = row.median(self.measure)
            return inf if median is None else median if self.ranked else 0.0

        yield from sorted(self.rows, key=key)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "mode": self.mode,
            "title": self.title,
            "question": self.question,
            "measure": self.measure,
            "bytes": self.nbytes,
            "limits": list(self.limits),
            "limit_s": self.limit_s(),
            "reference": self.reference,
            "ranked": self.ranked,
            "problem": self.problem,
            "rows": [row.document() for row in self.in_order()],
        }


@dataclass(slots=True)
class Bench:
    """What all groups of a run share.

    Attributes:
        rounds: Samples a row.
        order: Draws the order of the rows in each round.
        note: Told what is being measured.
        cache: Puts files into the page cache and out of it.
    """

    rounds: int
    order: random.Random
    note: Note
    cache: PageCache = field(default_factory=PageCache)

    def measure(self, group: Group) -> Group:
        """Take a sample of every case a round; what fails once is not tried again."""
        group.rows = [Row(c.name, c.kind, c.version, c.problem, c.note) for c in group.cases]
        for number in range(self.rounds):
            pairs = list(zip(group.cases, group.rows, strict=True))
            # A row that always follows the same other one inherits what that one leaves behind.
            for case, row in self.order.sample(pairs, len(pairs)):
                self.note(f"{group.title}, round {number + 1} of {self.rounds}: {case.name}")
                self.sample(case, row, group.nbytes)
        _compare_digests(group)
        return group

    def sample(self, case: Case, row: Row, nbytes: int) -> None:
        """Take one sample into a row, unless the row has a problem already."""
        if row.problem:
            return
        try:
            case.prepare()
            row.samples.append(
                run_forked(
                    case.run,
                    deadline_s=deadline_s(nbytes) + case.extra_s,
                    pretouch_bytes=case.pretouch_bytes,
                )
            )
        except SllmError as exc:
            row.problem = str(exc)


def deadline_s(nbytes: int) -> float:
    """How long a sample that moves so many bytes may take."""
    return _DEADLINE_S + nbytes / _SLOWEST_BYTES_PER_S


def _compare_digests(group: Group) -> None:
    """Mark rows whose bytes are not those that sllmctl loaded."""
    checks = [
        (case, row, {sample.check for sample in row.samples if sample.check})
        for case, row in zip(group.cases, group.rows, strict=True)
        if case.kind != "limit"
    ]
    expected: dict[str, set[str]] = {}
    for case, row, found in checks:
        if case.kind == "ours" and found and not case.may_differ:
            if len(found) > 1:
                row.problem = "its samples differ in their bytes"
                row.samples.clear()
            else:
                expected.setdefault(case.bytes_of, found)
    for case, row, found in checks:
        if row.samples and found and found != expected.get(case.bytes_of, found):
            if case.may_differ:
                row.note = "builds other tensors than the file has, so bytes were not compared"
            else:
                row.problem = "its bytes are not those of the file"
                row.samples.clear()

"""What a load may cost: bounds on ratios within one run, and on a few plain figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sllmctl.bench import load_mode as load
from sllmctl.bench import ways
from sllmctl.bench.rows import Group, Measure, Row
from sllmctl.core.units import format_seconds, format_size

# Peers that have read every byte when they return, so that their processor time is that of a load.
_READ_ALL = (ways.PREAD, ways.TORCH, ways.RUNAI, ways.FASTSAFETENSORS, ways.TENSORIZER)
WARM_FIXED_S, WARM_TENSOR_S, WARM_SEGMENT_S = 5e-3, 5e-6, 50e-6


@dataclass(frozen=True, slots=True)
class Budget:
    """A bound. ``value`` is None where it was not measured; ``figures`` says what it is made of."""

    text: str
    value: float | None
    bound: float
    at_least: bool
    figures: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bound holds; None where it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "text": self.text,
            "value": self.value,
            "bound": self.bound,
            "at_least": self.at_least,
            "met": self.met,
            "figures": self.figures,
        }


@dataclass(frozen=True, slots=True)
class _Median:
    """A row's median of one figure."""

    name: str
    value: float

    def over(self, other: _Median | None) -> float | None:
        return self.value / other.value if other is not None and other.value else None

    def __str__(self) -> str:
        return f"{self.name} {format_seconds(self.value)}"


def budgets(groups: Sequence[Group], *, tensors: int, segments: int) -> list[Budget]:
    """Every budget that the measured groups have something to say about."""
    found = [
        *_disk(groups),
        *_store(groups, tensors, segments),
        *_convert_and_start(groups),
    ]
    return [budget for budget in found if budget.value is not None]


def _disk(groups: Sequence[Group]) -> Iterator[Budget]:
    cold, raw = _median(groups, load.COLD, ways.OURS.name), _median(groups, load.COLD, load.RAW)
    yield _rate("cold load, as a rate, of the raw direct read's", cold, raw, 0.95)
    ours = _median(groups, load.COLD, ways.OURS.name, "cpu_s")
    leanest = _least(_medians(groups, load.COLD, [way.name for way in _READ_ALL], "cpu_s"))
    yield _time(
        "cold load: CPU time, of the leanest peer's that reads every byte", ours, leanest, 0.5
    )
    if _row(groups, load.CACHED, load.PINNED) is not None:
        return  # what follows is about host memory
    peers = [way.name for way in ways.PEERS]
    ready, reference = (
        _median(groups, load.CACHED, way.name) for way in (ways.OURS, ways.SAFETENSORS)
    )
    yield _time("page cache full: ready, of safetensors' time", ready, reference, 0.5)
    every = _median(groups, load.CACHED, ways.OURS.name, "all_s")
    memory = _median(groups, load.CACHED, load.READ, "all_s")
    yield _time("page cache full: every byte read, of a plain read of memory", every, memory, 1.3)
    for what, figure in (("ready", "ready_s"), ("every byte read", "all_s")):
        ours = _median(groups, load.CACHED, ways.OURS.name, figure)
        fastest = _least(_medians(groups, load.CACHED, peers, figure))
        yield _time(f"page cache full: {what}, of the fastest peer's time", ours, fastest, 1.0)
    copy, plain = (_median(groups, load.PRIVATE, name) for name in (ways.OURS_COPY.name, load.COPY))
    yield _rate("private copy, as a rate, of a plain copy by two threads", copy, plain, 0.8)
    names = [way.name for way in ways.PRIVATE_PEERS]
    fastest = _least(_medians(groups, load.PRIVATE, names, "ready_s"))
    yield _time("private copy, of the fastest peer's time", copy, fastest, 1.0)


def _store(groups: Sequence[Group], tensors: int, segments: int) -> Iterator[Budget]:
    warm = _median(groups, load.WARM, ways.OURS_STORE.name)
    pinned = _median(groups, load.WARM, load.PINNED)
    if pinned is not None:
        yield _rate("warm load, as a rate, of pinned memory to the device", warm, pinned, 0.92)
    else:
        bound_s = WARM_FIXED_S + WARM_TENSOR_S * tensors + WARM_SEGMENT_S * segments
        allowed = _Median(f"{tensors:,} tensors in {segments} segments may take", bound_s)
        yield _time("warm load, of 5 ms + 5 µs a tensor + 50 µs a segment", warm, allowed, 1.0)
    first = _median(groups, load.FIRST, ways.OURS_STORE.name)
    slower = _most(_medians(groups, load.FIRST, [load.RAW, load.PINNED], "ready_s"))
    yield _time("first load through the store, of the slower of disk and link", first, slower, 1.05)
    crowd = _row(groups, load.LEASES, load.MANY_LEASES)
    grown = crowd.median("private_bytes") if crowd is not None else None
    yield Budget(
        "1,000 idle leases: memory of the store, MB",
        None if grown is None else grown / 1e6,
        100,
        False,
    )


def _convert_and_start(groups: Sequence[Group]) -> Iterator[Budget]:
    plain = _median(groups, load.CONVERT, load.CP)
    ours = _median(groups, load.CONVERT, load.CONVERT_ONLY)
    yield _rate("convert --no-verify, as a rate, of cp + fsync", ours, plain, 0.9)
    for name in (load.CONVERT_ONLY, load.CONVERT_VERIFY):
        row = _row(groups, load.CONVERT, name)
        peak = row.median("peak_bytes") if row is not None else None
        yield Budget(
            f"{name}: peak memory, MiB",
            None if peak is None else peak / 2**20,
            512,
            False,
            "" if peak is None else format_size(peak),
        )
    index = _median(groups, load.START, load.INDEX)
    yield Budget("100,000 tensors: index read and checked, s", _value(index), 0.3, False)
    shown = _median(groups, load.START, load.HELP)
    typer = _median(groups, load.START, load.TYPER)
    yield Budget("sllmctl --help, s", _value(shown), 0.25, False)
    beyond = shown.value - typer.value if shown is not None and typer is not None else None
    figures = f"{shown}, {typer}" if beyond is not None else ""
    yield Budget("sllmctl --help beyond typer's import, s", beyond, 0.1, False, figures)


def _time(text: str, ours: _Median | None, bound: _Median | None, limit: float) -> Budget:
    """A bound on our time as a part of another."""
    value = ours.over(bound) if ours is not None else None
    return Budget(text, value, limit, False, f"{ours}, {bound}")


def _rate(text: str, ours: _Median | None, bound: _Median | None, limit: float) -> Budget:
    """A bound on our rate as a part of another."""
    value = bound.over(ours) if bound is not None else None
    return Budget(text, value, limit, True, f"{ours}, {bound}")


def _row(groups: Iterable[Group], title: str, name: str) -> Row | None:
    group = next((group for group in groups if group.title == title), None)
    return group.row(name) if group is not None else None


def _median(
    groups: Iterable[Group], title: str, name: str, figure: Measure | str = "ready_s"
) -> _Median | None:
    row = _row(groups, title, name)
    value = row.median(figure) if row is not None else None
    return None if value is None else _Median(name, value)


def _medians(
    groups: Sequence[Group], title: str, names: Iterable[str], figure: str
) -> list[_Median]:
    found = (_median(groups, title, name, figure) for name in names)
    return [median for median in found if median is not None]


def _least(medians: list[_Median]) -> _Median | None:
    return min(medians, key=lambda median: median.value, default=None)


def _most(medians: list[_Median]) -> _Median | None:
    return max(medians, key=lambda median: median.value, default=None)


def _value(median: _Median | None) -> float | None:
    return median.value if median is not None else None

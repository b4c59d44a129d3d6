"""Rounds, their order, rows that fail, and what must hold between rows."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sllmctl.bench import load_mode, ways
from sllmctl.bench.budgets import budgets
from sllmctl.bench.measure import Sample
from sllmctl.bench.rows import Bench, Case, Group, Kind, Spread
from sllmctl.errors import SllmError


def bench(rounds: int = 4) -> Bench:
    return Bench(rounds, random.Random(1), lambda text: None)


def case(name: str, kind: Kind = "peer", check: str | None = None, **options: object) -> Case:
    return Case(name, kind, lambda: Sample(1.0, 2.0, check=check), **options)  # type: ignore[arg-type]


def test_every_round_has_every_row_once_in_an_order_of_its_own() -> None:
    taken: list[str] = []
    cases = [
        Case(name, "peer", lambda: Sample(1.0, 1.0), lambda name=name: taken.append(name))
        for name in "abcde"
    ]
    bench(4).measure(Group("g", "?", "all_s", cases))
    rounds = [tuple(taken[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(one) == list("abcde") for one in rounds)
    assert len(set(rounds)) > 1


def test_a_row_that_failed_is_not_tried_again() -> None:
    tries: list[int] = []

    def prepare() -> None:
        tries.append(1)
        raise SllmError("no such device")

    group = Group("g", "?", "all_s", [Case("a", "peer", lambda: Sample(1.0), prepare)])
    (row,) = bench().measure(group).rows
    assert row.problem == "no such device"
    assert len(tries) == 1 and not row.samples


def test_a_row_with_other_bytes_has_no_figures() -> None:
    cases = [
        case("limit", "limit", "other"),
        case("sllmctl", "ours", "x"),
        case("same", check="x"),
        case("wrong", check="y"),
        case("model", check="z", may_differ=True),
        case("elsewhere", check="y", bytes_of="another file"),
    ]
    group = bench(1).measure(Group("g", "?", "all_s", cases))
    assert {row.name for row in group.rows if row.problem} == {"wrong"}
    wrong, model = group.row("wrong"), group.row("model")
    assert wrong is not None and not wrong.samples and "bytes" in wrong.problem
    assert model is not None and "not compared" in model.note


def test_rows_are_shown_from_the_fastest_and_those_without_a_figure_last(
    make_group: Callable[..., Group],
) -> None:
    group = make_group({"limit": [1.0], "sllmctl": [3.0], "safetensors": [2.0], "none": []})
    assert [row.name for row in group.in_order()] == ["limit", "safetensors", "sllmctl", "none"]


def test_a_spread_has_middle_and_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 1.0, 2.0, 4.0, 5.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0)


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.2, False)])
def test_a_cold_load_has_to_come_near_to_the_disk(
    make_group: Callable[..., Group], ours: float, met: bool
) -> None:
    times = {load_mode.RAW: [1.0], ways.OURS.name: [ours], ways.SAFETENSORS.name: [2.0]}
    found = budgets([make_group(times, title=load_mode.COLD)], tensors=1, segments=1)
    (rate,) = [budget for budget in found if "direct read" in budget.text]
    assert rate.met is met
    assert rate.value == pytest.approx(1 / ours)


def test_the_fastest_peer_counts_whatever_its_name(make_group: Callable[..., Group]) -> None:
    times = {load_mode.READ: [0.1], ways.OURS.name: [1.0]}
    times |= {way.name: [3.0] for way in ways.PEERS} | {ways.PEERS[-1].name: [0.9]}
    found = budgets([make_group(times, title=load_mode.CACHED)], tensors=1, segments=1)
    (every,) = [b for b in found if "every byte read, of the fastest peer" in b.text]
    assert every.met is False
    assert ways.PEERS[-1].name in every.figures


def test_bytes_from_the_page_cache_are_held_against_a_read_that_is_ready_at_once() -> None:
    cases = [
        Case(load_mode.READ, "limit", lambda: Sample(0.0, 0.1)),
        Case(ways.OURS.name, "ours", lambda: Sample(0.01, 0.12)),
    ]
    group = bench(1).measure(Group(load_mode.CACHED, "?", "all_s", cases))
    (every,) = [b for b in budgets([group], tensors=1, segments=1) if "plain read" in b.text]
    assert every.value == pytest.approx(1.2)
    assert every.met is True


def test_what_was_not_measured_has_no_budget(make_group: Callable[..., Group]) -> None:
    assert budgets([], tensors=1, segments=1) == []
    group = make_group({load_mode.RAW: [], ways.OURS.name: [1.0]}, title=load_mode.COLD)
    assert budgets([group], tensors=1, segments=1) == []

"""A run's parts without a run: rows with made-up times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sllmctl.bench.measure import Sample
from sllmctl.bench.rows import Group, Row

MACHINE = {"processor": "P", "kernel": "Linux", "load at the start": "0.1"}


@pytest.fixture
def make_group() -> Callable[..., Group]:
    """Build a group from ``{row: [seconds, ...]}``; the first row is a limit, the next is ours."""

    def make(
        times: dict[str, Sequence[float]], *, title: str = "cold", reference: str = "safetensors"
    ) -> Group:
        group = Group(title, "How long?", "all_s", [], 10**9, (next(iter(times)),), reference)
        kinds = ["limit", "ours", *["peer"] * len(times)]
        for (name, seconds), kind in zip(times.items(), kinds, strict=False):
            row = Row(name, kind, "1.0")  # type: ignore[arg-type]
            row.samples = [Sample(s / 2, s, cpu_s=0.1, disk_bytes=5) for s in seconds]
            group.rows.append(row)
        return group

    return make


@pytest.fixture
def make_document() -> Callable[..., dict[str, Any]]:
    """A document around some groups."""

    def make(*groups: Group, **changes: Any) -> dict[str, Any]:
        return {
            "schema": "sllmctl.bench/1",
            "sllmctl": "0.1.0",
            "started": "2026-01-01T00:00:00Z",
            "rounds": 3,
            "device": "cpu",
            "cold_by": "posix_fadvise(DONTNEED)",
            "checkpoint": {
                "name": "<b>model</b>",
                "generated": False,
                "bytes": 10**9,
                "tensors": 7,
                "shards": 1,
            },
            "machine": MACHINE,
            "imports": {"torch": 2.0},
            "groups": [group.document() for group in groups],
            "budgets": [],
            **changes,
        }

    return make

"""The results of a run as one document, ``sllmctl.bench/1``, and two of them side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from sllmctl.core.units import format_seconds
from sllmctl.errors import ConfigError

SCHEMA = "sllmctl.bench/1"
Document = dict[str, Any]
Change = Literal["faster", "slower", "same", "new"]


def read_document(path: Path) -> Document:
    """Read what an earlier run wrote.

    Raises:
        ConfigError: It is no such document.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read `{path}`: {exc}") from exc
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ConfigError(
            f"`{path}` is not a result of `sllmctl bench` ({SCHEMA})",
            hint="`sllmctl bench --output DIR` writes one to DIR/results.json",
        )
    return document


def compare(document: Document, old: Document, name: str) -> None:
    """Say in every row how it stands to an earlier run's.

    A row is faster or slower when the two spreads, from the fastest to the slowest sample, do not
    touch; otherwise it is the same. Each gets ``change`` and ``before``, the old spread.
    """
    before = {
        (group["mode"], group["title"], row["name"]): (group, row)
        for group in old["groups"]
        for row in group["rows"]
    }
    for group in document["groups"]:
        for row in group["rows"]:
            old_group, old_row = before.get(
                (group["mode"], group["title"], row["name"]), (group, {"figures": {}})
            )
            now = row["figures"].get(group["measure"])
            then = old_row["figures"].get(old_group["measure"])
            row["before"] = then
            row["change"] = None if now is None else _change(now, then)
    document["compared_with"] = {
        "file": name,
        "sllmctl": old["sllmctl"],
        "started": old["started"],
        "other_machine": sorted(_differences(document["machine"], old["machine"])),
        "other_bytes": document["checkpoint"]["bytes"] != old["checkpoint"]["bytes"],
    }


def _change(now: dict[str, float], then: dict[str, float] | None) -> Change:
    if then is None:
        return "new"
    if now["max"] < then["min"]:
        return "faster"
    return "slower" if now["min"] > then["max"] else "same"


def _differences(machine: dict[str, str], old: dict[str, str]) -> set[str]:
    passing = {"load at the start", "memory"}
    names = {*machine, *old} - passing
    return {name for name in names if machine.get(name) != old.get(name)}


def change_text(row: dict[str, Any]) -> str:
    """A row's change for people, or ""."""
    change = row.get("change")
    if change is None or change == "new":
        return change or ""
    was = format_seconds(row["before"]["median"])
    return f"{change} than {was}" if change != "same" else f"same as {was}"


def ratio_to_reference(group: dict[str, Any], row: dict[str, Any]) -> float | None:
    """How many times faster a row is than the group's reference."""
    name = group["reference"]
    if not group["ranked"]:
        name += f", {row['name'].partition(', ')[2]}"
    return _over(_median(group, name), _median_of(group, row))


def part_of_limit(group: dict[str, Any], row: dict[str, Any]) -> float | None:
    """The speed of a row as a part of the limit's."""
    return _over(group["limit_s"], _median_of(group, row))


def _median(group: dict[str, Any], name: str) -> float | None:
    rows = [row for row in group["rows"] if row["name"] == name]
    return _median_of(group, rows[0]) if rows else None


def _median_of(group: dict[str, Any], row: dict[str, Any]) -> float | None:
    figure = row["figures"].get(group["measure"])
    return figure["median"] if figure else None


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def figure(row: dict[str, Any], name: str) -> dict[str, float] | None:
    """The spread of one figure of a row."""
    found: dict[str, float] | None = row["figures"].get(name)
    return found


def modes(document: Document) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The groups of every mode, in their order."""
    for mode in dict.fromkeys(group["mode"] for group in document["groups"]):
        yield mode, [group for group in document["groups"] if group["mode"] == mode]

"""Tables of a run's figures: the cells that every form of a report shows."""

from __future__ import annotations

import statistics
from typing import Any

from sllmctl.bench.document import (
    Document,
    change_text,
    figure,
    part_of_limit,
    ratio_to_reference,
)
from sllmctl.core.units import format_count, format_rate, format_seconds, format_size

Table = tuple[list[str], list[list[str]]]
READY, EVERY = "ready", "every byte read"
_MEASURES = {"ready_s": READY, "all_s": EVERY}


def group_table(group: dict[str, Any], *, full: bool = False) -> Table:
    """Columns (``>`` right-aligned) and measured rows of one group, from the fastest on.

    Columns in which no row has anything to say are left out. ``full`` adds quartiles, memory that
    no other process shares, and what came from the disk.
    """
    measured = _MEASURES[group["measure"]]
    columns = [
        group["title"],
        f">{READY}",
        f">{EVERY}",
        f">fastest .. slowest, {measured}",
        ">quartiles",
        ">rate",
        ">of which the load",
        f">× {group['reference']}",
        ">of the limit",
        ">CPU",
        ">peak",
        ">not shared",
        ">from disk",
        "change",
    ]
    rows = [_cells(group, row) for row in measured_rows(group)]
    only_full = (">quartiles", ">not shared", ">from disk")
    hidden = set() if full else {columns.index(column) for column in only_full}
    kept = [
        i for i in range(len(columns)) if i < 2 or (i not in hidden and any(row[i] for row in rows))
    ]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def measured_rows(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that have figures, from the fastest on."""
    return [row for row in group["rows"] if figure(row, group["measure"])]


def group_notes(group: dict[str, Any]) -> list[str]:
    """What a reader of a group's table has to know: a line for each thing."""
    lines = [f"Not measured: {group['problem']}."] if group["problem"] else []
    for row in group["rows"]:
        if row["problem"]:
            sampled = figure(row, group["measure"])
            what = "ended early" if sampled else "not measured"
            lines.append(f"{row['name']}, {what}: {row['problem']}.")
        elif row["note"]:
            lines.append(f"{row['name']}: {row['note']}.")
    return lines


def _cells(group: dict[str, Any], row: dict[str, Any]) -> list[str]:
    name = f"{row['name']} {row['version']}" if row["version"] else row["name"]
    measured = row["figures"][group["measure"]]
    ready, every = row["figures"]["ready_s"], figure(row, "all_s")
    ratio, part = ratio_to_reference(group, row), part_of_limit(group, row)
    nbytes = group["bytes"]
    limit = row["kind"] == "limit"
    return [
        name,
        format_seconds(ready["median"]) if ready["median"] else "",
        format_seconds(every["median"]) if every and not (limit and ready["median"]) else "",
        f"{format_seconds(measured['min'])} .. {format_seconds(measured['max'])}",
        f"{format_seconds(measured['q1'])} .. {format_seconds(measured['q3'])}",
        format_rate(nbytes, measured["median"]) if nbytes else "",
        _load_stage(row),
        "" if ratio is None or limit else f"{ratio:.2f}",
        "" if part is None or limit else f"{part:.0%}",
        *(_amount(row, name) for name in ("cpu_s", "peak_bytes", "private_bytes", "disk_bytes")),
        change_text(row),
    ]


def _load_stage(row: dict[str, Any]) -> str:
    """What a process that also starts an engine spends on the load."""
    stages = [sample["stages"]["load_s"] for sample in row["samples"] if sample["stages"]]
    return format_seconds(statistics.median(stages)) if stages else ""


def _amount(row: dict[str, Any], name: str) -> str:
    spread = figure(row, name)
    if not spread or not spread["median"]:
        return ""
    seconds = name.endswith("_s")
    return format_seconds(spread["median"]) if seconds else format_size(spread["median"])


def budget_table(document: Document) -> Table:
    """Every budget: what was measured, the bound, and whether it is met."""
    rows = [
        [
            budget["text"],
            f"{budget['value']:.3g}",
            f"{'≥' if budget['at_least'] else '≤'} {budget['bound']:g}",
            "met" if budget["met"] else "not met",
            budget["figures"],
        ]
        for budget in document["budgets"]
    ]
    return ["budget", ">measured", ">bound", "", "made of"], rows


def machine_table(document: Document) -> Table:
    """The machine, line by line."""
    return ["machine", ""], [[name, text] for name, text in document["machine"].items()]


def import_table(document: Document) -> Table:
    """What was imported before the first sample, each beyond those before it."""
    rows = [[name, format_seconds(seconds)] for name, seconds in document["imports"].items()]
    return ["import, beyond those above", ">time, once"], rows


def title_line(document: Document) -> str:
    """What was loaded, in a line."""
    checkpoint = document["checkpoint"]
    return (
        f"{checkpoint['name']}: {format_size(checkpoint['bytes'])}, "
        f"{format_count(checkpoint['tensors'], 'tensor')} in "
        f"{format_count(checkpoint['shards'], 'file')}, to {document['device']}; "
        f"median of {format_count(document['rounds'], 'round')}"
    )


def method_line(document: Document) -> str:
    """How it was measured, in a line."""
    return (
        f"Cold by {document['cold_by']}. Each sample is a new process; rounds are interleaved, "
        "in an order that is new in each; every byte was read, and those that differ from the "
        f"file's are marked. sllmctl {document['sllmctl']}, {document['started']}."
    )


def compared_line(document: Document) -> str:
    """What it was compared with, in a line, or ""."""
    other = document.get("compared_with")
    if not other:
        return ""
    text = (
        f"Compared with {other['file']} (sllmctl {other['sllmctl']}, {other['started']}): faster "
        "and slower are rows whose samples lie outside the old ones', all of them."
    )
    if other["other_bytes"]:
        text += " The checkpoint had another size."
    if other["other_machine"]:
        text += f" The machines differ: {', '.join(other['other_machine'])}."
    return text

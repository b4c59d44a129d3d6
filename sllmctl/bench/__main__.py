"""`python -m sllmctl.bench`: loads and conversion, side by side, against the machine's limits."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

from sllmctl import __version__
from sllmctl.bench import suite
from sllmctl.bench.generate import make_qwen3
from sllmctl.bench.measure import Row
from sllmctl.console import Console
from sllmctl.core.config import resolve_model
from sllmctl.core.units import format_rate, format_seconds, format_size, parse_size

STORE_GROUPS = ("first load", "warm, page cache empty")
GROUPS = ("cold", "page cache", "private copy", *STORE_GROUPS, "convert", "start")


def main() -> None:
    """Measure, print the tables, and say which budgets hold."""
    parser = argparse.ArgumentParser(prog="python -m sllmctl.bench", description=__doc__)
    parser.add_argument("model", nargs="?", help="a checkpoint; without it, one is generated")
    parser.add_argument("--size", default="2GB", help="of the generated checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=GROUPS, action="append", help="groups to run")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    options = parser.parse_args()
    import safetensors.torch
    import torch

    with tempfile.TemporaryDirectory(prefix="sllmctl-bench-", dir=Path.cwd()) as scratch:
        if options.model:
            path = resolve_model(options.model)
        else:
            path = Path(scratch) / "generated"
            print(f"generating a checkpoint of {options.size}", file=sys.stderr)
            make_qwen3(path, parse_size(options.size))
        only = options.only or GROUPS
        rows: dict[str, dict[str, Row]] = {}
        with suite.torch_copy(path) as torch_file:
            groups = suite.load_groups(path, torch_file)
            for group in groups:
                if group.title in only:
                    rows[group.title] = group.run(options.rounds, _note)
        nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        if set(STORE_GROUPS).intersection(only):
            with suite.running_store(Path(scratch), nbytes) as socket:
                for group in suite.store_groups(path, socket):
                    if group.title in only:
                        rows[group.title] = group.run(options.rounds, _note)
        for group in (suite.convert_group(path), suite.start_group(Path(scratch))):
            if group.title in only:
                rows[group.title] = group.run(options.rounds, _note)
    budgets = list(suite.budgets(rows))
    for title, group_rows in rows.items():
        _print_group(title, group_rows, 0 if title == "start" else nbytes)
    print()
    for line in Console().table(
        ["budget", ">measured", ">bound", ""],
        [
            [
                budget.text,
                f"{budget.value:.3g}",
                f"{'≥' if budget.at_least else '≤'} {budget.bound}",
                "holds" if budget.held else "missed",
            ]
            for budget in budgets
            if budget.value is not None
        ],
    ):
        print(line)
    if options.json:
        document = {
            "schema": "sllmctl.bench/1",
            "sllmctl": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "machine": platform.platform(),
            "python": platform.python_version(),
            "bytes": nbytes,
            "rounds": options.rounds,
            "groups": {
                title: [row.document() for row in group_rows.values()]
                for title, group_rows in rows.items()
            },
            "budgets": [
                {"text": b.text, "value": b.value, "bound": b.bound, "held": b.held}
                for b in budgets
            ],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _print_group(title: str, rows: dict[str, Row], nbytes: int) -> None:
    table = []
    for row in rows.values():
        ready, whole = row.median("ready_s"), row.median("all_s")
        between = suite.spread(row)
        if ready is None or between is None:
            table.append([row.name, row.problem or "not measured", "", "", "", "", ""])
            continue
        table.append(
            [
                row.name,
                format_seconds(ready),
                f"{format_seconds(between[0])} .. {format_seconds(between[1])}",
                format_rate(nbytes, ready) if nbytes else "",
                format_seconds(whole) if whole is not None else "",
                format_seconds(row.median("cpu_s") or 0.0),
                format_size(row.median("peak_bytes") or 0),
            ]
        )
    print()
    columns = [title, ">ready", ">fastest .. slowest", ">rate", ">every byte read", ">CPU", ">peak"]
    for line in Console().table(columns, table):
        print(line)


if __name__ == "__main__":
    main()

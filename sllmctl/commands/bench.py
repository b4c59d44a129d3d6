"""`sllmctl bench`: every way to load, side by side, against the machine's limits."""

from __future__ import annotations

import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sllmctl.commands.options import AsJson, StoragePath, quiet_option
from sllmctl.console import Console
from sllmctl.core.units import format_seconds, parse_size

if TYPE_CHECKING:
    from sllmctl.bench.document import Document

EXIT_TERMINATED = 128 + signal.SIGTERM


class Mode(str, Enum):
    """What to find out."""

    LOAD = "load"
    SWITCH = "switch"
    STARTUP = "startup"
    SCALE = "scale"
    ALL = "all"


class Only(str, Enum):
    """Groups of the mode `load`."""

    COLD = "cold"
    PAGE_CACHE = "page-cache"
    PRIVATE_COPY = "private-copy"
    FIRST_LOAD = "first-load"
    WARM = "warm"
    IDLE_LEASES = "idle-leases"
    CONVERT = "convert"
    START = "start"


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL", help="A name or a path; without one, a checkpoint is generated."
        ),
    ] = None,
    size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="Size of the generated checkpoint.")
    ] = "1GB",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Samples per row.")] = 5,
    mode: Annotated[
        Mode,
        typer.Option(
            "--mode",
            help="What to measure: ways to load, model switches by pool size, process start to "
            "first token, scaling with processes, bytes and tensors, or all of these.",
        ),
    ] = Mode.LOAD,
    only: Annotated[
        list[Only] | None,
        typer.Option("--only", help="Measure only this group of --mode load. Repeatable."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Device to load to.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Write results.json, report.html and charts to this directory.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="OLD.json",
            help="Mark rows that are faster or slower than in this earlier results.json.",
            show_default=False,
        ),
    ] = None,
    storage_path: StoragePath = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, quiet_option("the number of missed budgets")] = False,
) -> None:
    """Compare all ways to load a checkpoint on this machine.

    Figures stand next to the limits of disk, memory and device link.

    Examples:

      sllmctl bench --size 100MB --rounds 2

      sllmctl bench Qwen/Qwen3-8B --output report --compare old/results.json
    """
    from sllmctl.bench.document import compare as compare_documents
    from sllmctl.bench.document import read_document
    from sllmctl.bench.report import check_directory, write_report
    from sllmctl.bench.run import MODES, Options, run
    from sllmctl.core.devices import DeviceSpec

    console = Console.choose(as_json=as_json, quiet=quiet)
    old = read_document(compare) if compare is not None else None
    if output is not None:
        check_directory(output)
    options = Options(
        models=models or (),
        size_bytes=parse_size(size),
        rounds=rounds,
        modes=MODES if mode is Mode.ALL else (mode.value,),
        only=[group.value.replace("-", " ") for group in only or ()],
        device=str(DeviceSpec.parse(device)),
        storage=storage_path,
    )
    # Gigabytes of scratch files, and a store, must not be left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    with console.steps() as note:
        document = run(options, note)
    if old is not None:
        compare_documents(document, old, str(compare))
    files = write_report(document, output) if output is not None else []
    missed = sum(budget["met"] is False for budget in document["budgets"])
    human = _lines(console, document)
    human += ["", *(f"wrote {path}" for path in files)] if files else []
    console.result(document, quiet=missed, human=human)


def _lines(console: Console, document: Document) -> list[str]:
    from sllmctl.bench import tables

    lines = [tables.title_line(document), tables.method_line(document)]
    lines += [line] if (line := tables.compared_line(document)) else []
    for group in document["groups"]:
        lines += ["", f"{group['title']}: {group['question']}"]
        if tables.measured_rows(group):
            lines += console.table(*tables.group_table(group))
        lines += tables.group_notes(group)
    if document["budgets"]:
        lines += ["", *console.table(*tables.budget_table(document))]
    lines += ["", *console.table(*tables.machine_table(document))]
    if document["imports"]:
        times = (f"{n} {format_seconds(s)}" for n, s in document["imports"].items())
        lines += ["", f"imports, each beyond those before it: {', '.join(times)}"]
    return lines

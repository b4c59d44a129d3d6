"""`sllmctl status`, `warm`, `evict`: looking into the store."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sllmctl.commands.options import AsJson, Socket, quiet_option
from sllmctl.console import Console
from sllmctl.core.units import (
    format_count,
    format_page_size,
    format_rate,
    format_seconds,
    format_size,
)
from sllmctl.errors import ConfigError, SllmError, StoreUnreachable

_BAR_CELLS = 40
_WATCH_EVERY_S = 1.0


def status(
    socket: Socket = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, quiet_option("the bytes in use")] = False,
) -> None:
    """Show the store: its pool, its models, and who uses them.

    Examples:

      sllmctl status --watch

      sllmctl status --json
    """
    from sllmctl.store.manage import status as ask

    console = Console.choose(as_json=as_json, quiet=quiet)
    before: dict[str, Any] | None = None
    while True:
        answer = ask(socket=socket)
        if watch:
            console.clear()
        console.result(
            answer,
            quiet=answer["pool"]["used_bytes"],
            human=_status_lines(console, answer, before),
        )
        if not watch:
            return
        before = answer
        time.sleep(_WATCH_EVERY_S)


def warm(
    models: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Names below the store's storage path.")
    ],
    pin: Annotated[
        bool, typer.Option("--pin", help="Keep them in memory until they are evicted by name.")
    ] = False,
    socket: Socket = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, quiet_option("the warm bytes")] = False,
) -> None:
    """Bring checkpoints into the store before their next load.

    Examples:

      sllmctl warm Qwen/Qwen3-8B

      sllmctl warm Qwen/Qwen3-8B Qwen/Qwen3-4B --pin
    """
    from sllmctl.store import manage

    console = Console.choose(as_json=as_json, quiet=quiet)
    rows: list[dict[str, Any]] = []
    failures: list[SllmError] = []
    for name in models:
        try:
            with console.progress() as progress:
                done = manage.warm(name, pin=pin, socket=socket, progress=progress)
            rows.append({"name": name, **asdict(done), "problem": None})
        except SllmError as exc:
            if len(models) == 1 or isinstance(exc, StoreUnreachable):
                raise
            failures.append(exc)
            nothing = asdict(manage.Warmed(0, 0, 0, 0, 0.0))
            rows.append({"name": name, **nothing, "problem": str(exc)})
    console.result(
        {"schema": "sllmctl.warm/1", "models": rows},
        quiet="\n".join(str(row["warm_bytes"]) for row in rows),
        human=[_warm_line(row) for row in rows if row["problem"] is None],
    )
    for failure in failures:  # on stderr alone: stdout has its document
        Console().error(failure, failure.exit_code)
    if failures:
        raise typer.Exit(failures[0].exit_code)


def _warm_line(row: dict[str, Any]) -> str:
    rest = row["bytes"] - row["warm_bytes"]
    read = f"{format_size(row['read_bytes'])} read in {format_seconds(row['elapsed_s'])}"
    if row["read_bytes"]:
        read += f" - {format_rate(row['read_bytes'], row['elapsed_s'])}"
    if row["cache_bytes"]:
        read += f", {format_size(row['cache_bytes'])} of it from the page cache"
    return (
        f"{row['name']}: {format_size(row['warm_bytes'])} warm"
        + (f", {format_size(rest)} did not fit" if rest else "")
        + f", {read}"
    )


def evict(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Names as `status` shows them.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Evict every model that is neither in use nor pinned.")
    ] = False,
    socket: Socket = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, quiet_option("the bytes freed")] = False,
) -> None:
    """Free the memory of checkpoints in the store.

    A model that is in use is refused.

    Examples:

      sllmctl evict Qwen/Qwen3-8B

      sllmctl evict --all
    """
    from sllmctl.store import manage

    console = Console.choose(as_json=as_json, quiet=quiet)
    if bool(models) == everything:
        raise ConfigError("no model to evict", hint="give names, or --all")
    freed, kept = 0, []
    names: list[str | None] = [*(models or ())] or [None]
    for name in names:
        done = manage.evict(name, socket=socket)
        freed += done.bytes
        kept += done.kept
    for line in kept:
        console.warn(line)
    console.result(
        {"schema": "sllmctl.evict/1", "bytes": freed, "kept": kept},
        quiet=freed,
        human=[f"{format_size(freed)} evicted"],
    )


def _status_lines(
    console: Console, answer: dict[str, Any], before: dict[str, Any] | None
) -> list[str]:
    pool = answer["pool"]
    full = round(_BAR_CELLS * pool["used_bytes"] / pool["bytes"])
    parts = [
        f"{format_size(pool[f'{what}_bytes'])} {what}"
        for what in ("leased", "pinned", "orphaned")
        if pool[f"{what}_bytes"]
    ]
    locked = "locked" if pool["locked"] else "not locked"
    pages = f"{format_page_size(pool['page_bytes'])} pages in a {pool['backing']}, {locked}"
    lines = [
        f"store     {answer['socket']}, pid {answer['pid']}, "
        f"up {format_seconds(answer['uptime_s'])}",
        f"pool      [{'#' * full}{'.' * (_BAR_CELLS - full)}] {format_size(pool['used_bytes'])} of "
        f"{format_size(pool['bytes'])} used{', ' if parts else ''}{', '.join(parts)}",
        f"memory    {format_size(pool['prefaulted_bytes'])} allocated, {pages}",
    ]
    if before is not None and before["pid"] == answer["pid"]:  # the same store, not a new one
        lines.append(f"rates     {_rates(answer, before)}")
    lines.append("")
    if not answer["models"]:
        return [*lines, "no model is warm: `sllmctl warm NAME`, or the first load, brings one in"]
    rows = [
        [
            model["name"] + (" (pinned)" if model["pinned"] else ""),
            format_size(model["bytes"]),
            f"{100 * model['warm_bytes'] / model['bytes']:.0f}%" if model["bytes"] else "100%",
            model["state"],
            str(model["leases"]),
            f"{format_seconds(model['last_used_s'])} ago",
        ]
        for model in sorted(answer["models"], key=lambda model: model["last_used_s"])
    ]
    lines += console.table(["model", ">size", ">warm", "state", ">leases", ">last used"], rows)
    for lease in answer["leases"]:
        age = format_seconds(lease["age_s"])
        lines.append(f"  pid {lease['pid']} has used {lease['model']} for {age}")
    unlisted = sum(model["leases"] for model in answer["models"]) - len(answer["leases"])
    if unlisted:
        lines.append(f"  and {format_count(unlisted, 'younger lease')}")
    return lines


def _rates(answer: dict[str, Any], before: dict[str, Any]) -> str:
    """What came from where since the last picture."""
    seconds = answer["uptime_s"] - before["uptime_s"]
    more = {
        key: answer["counters"][key] - before["counters"][key]
        for key in ("bytes_disk", "bytes_cache", "bytes_warm", "loads")
    }
    sources = (("bytes_disk", "disk"), ("bytes_cache", "page cache"), ("bytes_warm", "memory"))
    parts = [f"{format_rate(more[key], seconds)} from {source}" for key, source in sources]
    return ", ".join([*parts, f"{more['loads'] / seconds:.1f} loads/s"])

"""`sllmctl load`: load a checkpoint, time each stage, prove that it works."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllmctl.commands.options import AsJson, ChunkSize, StoragePath, Threads, quiet_option
from sllmctl.commands.options import Socket as SocketPath
from sllmctl.console import Console, Format
from sllmctl.core.units import format_count, format_rate, format_seconds, format_size
from sllmctl.errors import ConfigError

if TYPE_CHECKING:
    from sllmctl.core.load import LoadStats


class Store(str, Enum):
    """Whether a load goes through the store."""

    AUTO = "auto"
    REQUIRE = "require"
    OFF = "off"


_STAGES = ("open", "plan", "read", "copy", "build")


def load(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name below the storage path, or a path.")
    ],
    device: Annotated[
        str,
        typer.Option(
            "--device", help="Target: npu:0, npu, cuda:1, cpu, or auto (npu, else cuda, else cpu)."
        ),
    ] = "cpu",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every byte with the digests of the conversion."),
    ] = False,
    map_files: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="auto|never",
            help="Map files that are in the page cache, or come there in huge pages; or never map. "
            "[default: auto]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", help="Build the model and let it answer this.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", min=1, help="Largest number of tokens in the answer to --prompt."
        ),
    ] = 32,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Load N times and report the median.")
    ] = 1,
    store: Annotated[
        Store,
        typer.Option("--store", help="Use a store if one is running, insist on one, or use none."),
    ] = Store.AUTO,
    socket: SocketPath = None,
    threads: Threads = None,
    chunk_size: ChunkSize = None,
    storage_path: StoragePath = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, quiet_option("the seconds")] = False,
) -> None:
    """Load a checkpoint and time each stage.

    --verify checks every byte; --prompt builds the model and lets it answer.

    Examples:

      sllmctl load Qwen/Qwen3-8B --device npu:0 --verify

      sllmctl load ./qwen3-8b --prompt "Hello" --max-new-tokens 8
    """
    from sllmctl import api
    from sllmctl.core.config import resolve_model
    from sllmctl.core.devices import find_device
    from sllmctl.core.load import LoadOptions

    console = Console.choose(as_json=as_json, quiet=quiet)
    spec = find_device(device)
    options = LoadOptions.choose(
        map_files=map_files, verify=verify, threads=threads, chunk_size=chunk_size
    )
    if prompt is not None and repeat > 1:
        raise ConfigError("--prompt and --repeat cannot be combined", hint="leave one of them out")
    if prompt is not None:
        path = resolve_model(model, storage_path)
    runs: list[LoadStats] = []
    with console.progress() as progress:
        for _ in range(repeat):
            loaded = api.load(
                model,
                spec,
                storage_path=storage_path,
                store=store.value,
                socket=socket,
                options=options,
                progress=progress,
            )
            runs.append(loaded.stats)
            if prompt is None:
                loaded.tensors.clear()
    stats = _median(runs)
    document = _document(model, str(spec), stats)
    if repeat > 1:
        document["runs"] = [_document(model, str(spec), run) for run in runs]
    human = _lines(console, document, stats, runs)
    if prompt is not None:
        from sllmctl.integrations.generate import answer

        reply = answer(path, loaded.tensors, prompt, max_new_tokens=max_new_tokens)
        document |= {"prompt": prompt, **reply.document()}
        human += ["", *reply.lines()]
    if console.format is Format.HUMAN and stats.verified:
        human.append("every byte equals the conversion's digests")
    console.result(document, quiet=f"{stats.elapsed_s:.6f}", human=human)


def _median(runs: list[LoadStats]) -> LoadStats:
    """The run of median time: a real one, so that its parts add up."""
    import statistics

    middle = statistics.median_low(run.elapsed_s for run in runs)
    return next(run for run in runs if run.elapsed_s == middle)


def _document(model: str, device: str, stats: LoadStats) -> dict[str, Any]:
    return {
        "schema": "sllmctl.load/1",
        "model": model,
        "device": device,
        "tensors": stats.tensors,
        "bytes": stats.bytes,
        "elapsed_s": stats.elapsed_s,
        "stages": {f"{stage}_s": getattr(stats, f"{stage}_s") for stage in _STAGES},
        "bytes_from": {
            "disk": stats.disk_bytes,
            "page_cache": stats.page_cache_bytes,
            "store": stats.store_bytes,
        },
        "mapped_bytes": stats.mapped_bytes,
        "gb_per_s": stats.bytes / stats.elapsed_s / 1e9 if stats.elapsed_s else 0.0,
        "verified": stats.verified,
    }


def _lines(
    console: Console, document: dict[str, Any], stats: LoadStats, runs: list[LoadStats]
) -> list[str]:
    mapped_where_they_were = stats.mapped_bytes - stats.brought_in_bytes
    rows = []
    for stage in _STAGES:
        seconds = getattr(stats, f"{stage}_s")
        moved = stats.bytes - mapped_where_they_were if stage == "read" else 0
        if seconds:
            rows.append(
                [
                    stage,
                    format_seconds(seconds),
                    format_size(moved) if moved else "",
                    format_rate(moved, seconds) if moved else "",
                ]
            )
    # What a store has is mapped into host memory, all of it, and copied to a device, all of it.
    store_mapped = stats.store_bytes if mapped_where_they_were >= stats.store_bytes else 0
    cache_mapped = mapped_where_they_were - store_mapped
    sources = [
        f"{format_size(nbytes)} {source}"
        for source, nbytes in (
            ("from disk", stats.disk_bytes - stats.brought_in_bytes),
            ("from disk into the page cache, nothing copied", stats.brought_in_bytes),
            ("copied from the page cache", stats.page_cache_bytes - cache_mapped),
            ("copied from the store", stats.store_bytes - store_mapped),
            ("mapped from the page cache, nothing copied", cache_mapped),
            ("mapped from the store, nothing copied", store_mapped),
        )
        if nbytes
    ]
    of_runs = ""
    if len(runs) > 1:
        times = [run.elapsed_s for run in runs]
        of_runs = (
            f" (median of {len(runs)} runs, "
            f"{format_seconds(min(times))} to {format_seconds(max(times))})"
        )
    return [
        f"loaded {document['model']} to {document['device']}: "
        f"{format_count(stats.tensors, 'tensor')}, {format_size(stats.bytes)} in "
        f"{format_seconds(stats.elapsed_s)} - {format_rate(stats.bytes, stats.elapsed_s)}{of_runs}",
        "",
        *console.table(["stage", ">time", ">bytes", ">rate"], rows),
        "",
        ", ".join(sources) or "no tensor has any bytes",
    ]

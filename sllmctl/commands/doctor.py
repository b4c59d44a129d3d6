"""`sllmctl doctor`: look over the machine, and say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sllmctl.commands.options import AsJson, quiet_option


def doctor(
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            metavar="auto|base|convert|store|vllm|sglang|build|all",
            help="What the machine is for, comma-separated; auto goes by what is installed.",
        ),
    ] = "auto",
    only: Annotated[
        str,
        typer.Option("--only", metavar="IDS", help="Run only these checks, such as CANN,PY006."),
    ] = "",
    skip: Annotated[
        str, typer.Option("--skip", metavar="IDS", help="Leave out these checks.")
    ] = "",
    list_checks: Annotated[bool, typer.Option("--list", help="List all checks.")] = False,
    explain_id: Annotated[
        str, typer.Option("--explain", metavar="ID", help="Explain a check.")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as failures.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also try the devices, in child processes.")
    ] = False,
    no_exec: Annotated[
        bool, typer.Option("--no-exec", help="Run no commands and open no connections.")
    ] = False,
    net: Annotated[
        bool, typer.Option("--net", help="Also check whether model hubs can be reached.")
    ] = False,
    model: Annotated[
        str, typer.Option("--model", help="Model that will be loaded: a path or a hub name.")
    ] = "",
    storage_path: Annotated[
        str, typer.Option("--storage-path", help="Directory that will hold checkpoints.")
    ] = "",
    mem_pool_size: Annotated[
        str, typer.Option("--mem-pool-size", metavar="SIZE", help="Memory that a store will get.")
    ] = "",
    base_url: Annotated[
        str,
        typer.Option(
            "--base-url", metavar="URL", help="Inference server to query as a client would."
        ),
    ] = "",
    served_model: Annotated[
        str, typer.Option("--served-model", metavar="NAME", help="Model name that clients use.")
    ] = "",
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="DIR",
            help="Source of sllm-store or sgl-kernel-npu that will be built here.",
        ),
    ] = "",
    lang: Annotated[
        str,
        typer.Option("--lang", metavar="en|zh", help="Output language. [default: the locale's]"),
    ] = "",
    root: Annotated[
        Path | None,
        typer.Option(
            "--root", help="Examine a machine recorded in a directory with a machine.json."
        ),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option("--tables", help="Use these version tables instead of the built-in ones."),
    ] = None,
    log: Annotated[
        str, typer.Option("--log", metavar="FILE", help="Explain an error log; - reads stdin.")
    ] = "",
    fix: Annotated[
        bool, typer.Option("--fix", help="Fix what can be fixed here, after asking.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what --fix would do.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    report: Annotated[
        str,
        typer.Option(
            "--report", metavar="FILE", help="Write a redacted report; - writes to stdout."
        ),
    ] = "",
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare", metavar="FILE", help="Compare with another machine's --json output."
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show the checks that passed.")
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, quiet_option("the verdict")] = False,
) -> None:
    """Find what is wrong with this machine, and say how to fix it.

    Exits with 3 if a check fails.

    Examples:

      sllmctl doctor

      sllmctl doctor --profile vllm --only CANN,PY --json
    """
    from sllmctl.commands.doctor_run import run

    run(
        profile=profile,
        only=only,
        skip=skip,
        list_checks=list_checks,
        explain_id=explain_id,
        strict=strict,
        deep=deep,
        no_exec=no_exec,
        net=net,
        model=model,
        storage_path=storage_path,
        mem_pool_size=mem_pool_size,
        base_url=base_url,
        served_model=served_model,
        source=source,
        lang=lang,
        root=root,
        tables=tables,
        log=log,
        fix=fix,
        dry_run=dry_run,
        yes=yes,
        report=report,
        compare=compare,
        verbose=verbose,
        as_json=as_json,
        quiet=quiet,
    )

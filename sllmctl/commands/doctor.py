"""`sllmctl doctor`: look over the machine, and say what to do."""

from __future__ import annotations

import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from sllmctl.commands.options import AsJson, Quiet
from sllmctl.console import Console
from sllmctl.core.units import parse_size
from sllmctl.doctor.check import CHECKS, PROFILES
from sllmctl.doctor.document import document
from sllmctl.doctor.examine import Examination, examine, matching
from sllmctl.doctor.machine import Machine, Options
from sllmctl.doctor.probe import Probe, TreeProbe
from sllmctl.doctor.redact import hide_secrets
from sllmctl.doctor.tables import load_tables
from sllmctl.doctor.text import LANGUAGES, language_of
from sllmctl.doctor.view import View, explain, lines, listing

_Text = Annotated[str, typer.Option(show_default=False)]


def doctor(
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            metavar="|".join(["auto", *PROFILES, "all"]),
            help="What the machine is for; several with commas. auto goes by what is installed.",
        ),
    ] = "auto",
    only: Annotated[
        str, typer.Option("--only", metavar="IDS", help="These checks alone, such as CANN,PY006.")
    ] = "",
    skip: Annotated[str, typer.Option("--skip", metavar="IDS", help="Not these checks.")] = "",
    list_checks: Annotated[bool, typer.Option("--list", help="List all checks.")] = False,
    explain_id: Annotated[
        str, typer.Option("--explain", metavar="ID", help="Say what a check is about.")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as failures.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Try the devices too, in child processes.")
    ] = False,
    no_exec: Annotated[
        bool, typer.Option("--no-exec", help="Run no command, connect to nothing.")
    ] = False,
    net: Annotated[bool, typer.Option("--net", help="Try whether hubs can be reached.")] = False,
    model: Annotated[
        str, typer.Option("--model", help="The model that is to be loaded: a path or a hub name.")
    ] = "",
    storage_path: Annotated[
        str, typer.Option("--storage-path", help="Where checkpoints are to live.")
    ] = "",
    mem_pool_size: Annotated[
        str, typer.Option("--mem-pool-size", metavar="SIZE", help="Memory that a store is to have.")
    ] = "",
    base_url: Annotated[
        str, typer.Option("--base-url", metavar="URL", help="A server to talk to, as clients do.")
    ] = "",
    served_model: Annotated[
        str, typer.Option("--served-model", metavar="NAME", help="The model name that clients use.")
    ] = "",
    lang: Annotated[
        str, typer.Option("--lang", metavar="en|zh", help="Language. [default: the locale's]")
    ] = "",
    root: Annotated[
        Path | None,
        typer.Option("--root", help="Look at a machine in a directory: an unpacked image."),
    ] = None,
    tables: Annotated[
        Path | None, typer.Option("--tables", help="Version tables other than this release's.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what passed, too.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what is here, what does not fit together, and what to do; exit 3 if something fails.

    Examples:

      sllmctl doctor

      sllmctl doctor --profile vllm --only CANN,PY --json
    """
    view = _view(lang, verbose)
    console = Console.choose(as_json=as_json, quiet=quiet)
    if list_checks or explain_id:
        _print(listing(view) if list_checks else _explain(explain_id, view))
        return
    machine = Machine(
        Probe() if root is None else TreeProbe(_directory(root)),
        Options(
            profiles=_profiles(profile),
            commands=not no_exec,
            network=net,
            deep=deep,
            model=model,
            storage_path=storage_path,
            pool_bytes=parse_size(mem_pool_size) if mem_pool_size else None,
            base_url=base_url,
            served_model=served_model,
        ),
        load_tables(tables),
    )
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    done = examine(machine, only=_ids(only, "--only"), without=_ids(skip, "--skip"))
    code = done.exit_code(strict=strict)
    console.result(
        document(done, started=started, exit_code=code),
        quiet=_verdict_word(done),
        human=lines(done, view),
    )
    if code:
        raise typer.Exit(code)


def _verdict_word(done: Examination) -> str:
    return {0: "ok", 3: "failed", 70: "broken"}[done.exit_code()]


def _print(text: list[str]) -> None:
    print("\n".join(text))


def _view(lang: str, verbose: bool) -> View:
    if lang and lang not in LANGUAGES:
        raise typer.BadParameter(f"`{lang}` is none of {', '.join(LANGUAGES)}", param_hint="--lang")
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    language = lang or language_of(dict(os.environ))
    return View(language if unicode or lang else "en", unicode, hide_secrets, verbose)


def _profiles(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if names == ("auto",):
        return names
    if names == ("all",):
        return PROFILES
    for name in names or ("",):
        if name not in PROFILES:
            raise typer.BadParameter(
                f"`{name}` is none of auto, {', '.join(PROFILES)}, all", param_hint="--profile"
            )
    return names


def _ids(text: str, option: str) -> list[str]:
    found: list[str] = []
    for pattern in filter(None, (part.strip() for part in text.split(","))):
        ids = matching(pattern)
        if not ids:
            raise typer.BadParameter(
                f"no check begins with `{pattern}`; --list lists them", param_hint=option
            )
        found += ids
    return found


def _explain(id: str, view: View) -> list[str]:  # noqa: A002
    known = CHECKS.get(id.strip().upper())
    if known is None:
        raise typer.BadParameter(
            f"there is no check `{id}`; --list lists them", param_hint="--explain"
        )
    return explain(known, view)


def _directory(root: Path) -> Path:
    if not root.is_dir():
        raise typer.BadParameter(f"`{root}` is no directory", param_hint="--root")
    return root

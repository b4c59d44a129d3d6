"""What `sllmctl doctor` does: a module of its own, since its checks take a while to import."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import typer

from sllmctl.console import Console
from sllmctl.core.host import available_memory_bytes
from sllmctl.core.units import parse_share, parse_size
from sllmctl.doctor.check import CHECKS, PROFILES, Status
from sllmctl.doctor.document import document
from sllmctl.doctor.examine import Examination, examine, matching
from sllmctl.doctor.fix import plan
from sllmctl.doctor.log_signatures import lines_of, read_log
from sllmctl.doctor.machine import Machine, Options
from sllmctl.doctor.probe import Probe
from sllmctl.doctor.redact import SECRET_NAME, Redactor, hide_secrets
from sllmctl.doctor.report import differences, markdown, read_document
from sllmctl.doctor.tables import load_tables
from sllmctl.doctor.text import LANGUAGES, language_of
from sllmctl.doctor.tree_probe import DESCRIPTION, TreeProbe
from sllmctl.doctor.view import View, explain, lines, listing, log_lines
from sllmctl.errors import ConfigError

EXIT_FINDINGS = 3
VERDICTS = {0: "ok", EXIT_FINDINGS: "failed", 70: "broken"}


def run(
    *,
    profile: str,
    only: str,
    skip: str,
    list_checks: bool,
    explain_id: str,
    strict: bool,
    deep: bool,
    no_exec: bool,
    net: bool,
    model: str,
    storage_path: str,
    mem_pool_size: str,
    base_url: str,
    served_model: str,
    source: str,
    lang: str,
    root: Path | None,
    tables: Path | None,
    log: str,
    fix: bool,
    dry_run: bool,
    yes: bool,
    report: str,
    compare: Path | None,
    verbose: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Look over the machine, and answer as the options of the same names ask.

    Raises:
        SllmError: An option makes no sense, or a file cannot be read.
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
            pool_bytes=_pool_bytes(mem_pool_size, root),
            pool_text=mem_pool_size,
            base_url=base_url,
            served_model=served_model,
            source=source,
        ),
        load_tables(tables),
    )
    if log:
        _explain_log(log, machine, console, view)
        return
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    done = examine(machine, only=_ids(only, "--only"), without=_ids(skip, "--skip"))
    if fix:
        _fix(done, console, view, dry_run=dry_run, yes=yes)
        return
    code = done.exit_code(strict=strict)
    whole = document(done, started=started, exit_code=code)
    if compare is not None:
        code = _compare(whole, compare, console, view, Redactor(machine.probe.host))
    elif report == "-":
        _print(markdown(whole).splitlines())
    else:
        if report:
            _write_report(report, markdown(whole), console)
        console.result(whole, quiet=VERDICTS[code], human=lines(done, view))
    if code:
        raise typer.Exit(code)


def _pool_bytes(text: str, root: Path | None) -> int | None:
    if "%" in text:
        return parse_share(text, available_memory_bytes(root or Path("/")))
    return parse_size(text) if text else None


def _explain_log(name: str, machine: Machine, console: Console, view: View) -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    try:
        with (
            contextlib.nullcontext(sys.stdin)
            if name == "-"
            else Path(name).open(encoding="utf-8", errors="replace")
        ) as source:
            matches = read_log(lines_of(source), machine.tables)
    except OSError as exc:
        raise ConfigError(f"cannot read `{name}`: {exc.strerror}") from exc
    ids = [id for id in CHECKS if any(id in match.checks for match in matches)]  # noqa: A001
    done = examine(machine, only=ids) if ids else None
    redact = Redactor(machine.probe.host)
    found = {
        "schema": "sllmctl.doctor-log/1",
        "matches": [
            {
                "id": match.id,
                "line_number": match.line_number,
                "line": redact(match.line),
                "count": match.count,
                "cause": str(match.cause),
                "checks": list(match.checks),
            }
            for match in matches
        ],
        "checks": document(done, started="", exit_code=0)["checks"] if done else [],
    }
    found["checks"] = [check for check in found["checks"] if check["id"] in ids]
    console.result(found, quiet=len(matches), human=log_lines(matches, done, view))
    if matches:
        raise typer.Exit(EXIT_FINDINGS)


def _fix(done: Examination, console: Console, view: View, *, dry_run: bool, yes: bool) -> None:
    actions = plan(done)
    if not actions:
        console.result(
            {"schema": "sllmctl.doctor-fix/1", "actions": [], "done": False},
            quiet=0,
            human=[view.say("There is nothing here that --fix can fix.")],
        )
        return
    human = [view.say("This is what --fix does:")]
    for action in actions:
        human += [
            f"  {' '.join(action.checks)}: {view.say(action.what)}",
            f"      {view.say('to undo it:')} {view.hide(action.undo)}",
        ]
    if not dry_run:
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(
                    "cannot ask for confirmation without a terminal",
                    hint="give --yes, or --dry-run",
                )
            _print(human)
            human = []
            if not typer.confirm(view.say("Do it?")):
                raise typer.Exit(1)
        for action in actions:
            action.apply()
            human.append(f"{view.mark(Status.PASS)} {view.say(action.what)}")
            if action.after:
                human.append(f"  {view.say(action.after)}")
        # A changed file can be looked at again; a changed environment needs a new shell.
        again = [id for a in actions if a.name != "env" for id in a.checks]  # noqa: A001
        if again:
            machine = done.machine
            mended = examine(Machine(machine.probe, machine.options, machine.tables), only=again)
            human += [
                f"  {view.mark(o.finding.status)} {o.check.id} {view.say(o.finding.summary)}"
                for o in mended.outcomes
                if o.check.id in again
            ]
    redact = Redactor(done.machine.probe.host)
    console.result(
        redact.document(
            {
                "schema": "sllmctl.doctor-fix/1",
                "actions": [
                    {"name": a.name, "checks": list(a.checks), "what": str(a.what), "undo": a.undo}
                    for a in actions
                ],
                "done": not dry_run,
            }
        ),
        quiet=len(actions),
        human=human,
    )


def _compare(
    here: dict[str, Any], path: Path, console: Console, view: View, redact: Redactor
) -> int:
    # The other document may come from anywhere: what it says is hidden as ours is.
    found = [
        (redact(what), *("***" if SECRET_NAME.search(what) else redact(text) for text in (h, t)))
        for what, h, t in differences(here, read_document(path))
    ]
    console.result(
        {
            "schema": "sllmctl.doctor-compare/1",
            "differences": [{"what": w, "here": h, "there": t} for w, h, t in found],
        },
        quiet=len(found),
        human=console.table(
            [view.say("what"), view.say("here"), view.say("there")], [list(row) for row in found]
        )
        if found
        else [view.say("both machines are alike")],
    )
    return EXIT_FINDINGS if found else 0


def _write_report(name: str, text: str, console: Console) -> None:
    try:
        Path(name).write_text(text, encoding="utf-8", errors="replace")
    except OSError as exc:
        raise ConfigError(f"cannot write `{name}`: {exc.strerror}") from exc
    console.warn(f"the report is in `{name}`; read it before you send it")


def _print(text: list[str]) -> None:
    print("\n".join(text))


def _view(lang: str, verbose: bool) -> View:
    if lang and lang not in LANGUAGES:
        raise typer.BadParameter(f"`{lang}` is none of {', '.join(LANGUAGES)}", param_hint="--lang")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Paths and variables may hold bytes that are no text: they must not end the command.
        sys.stdout.reconfigure(errors="replace")
    language = (lang or language_of(dict(os.environ))) if _can_write("中文") else "en"
    terminal = sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns if terminal else 0
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return View(language, _can_write("✓✗·"), hide_secrets, verbose, columns, colour)


def _can_write(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


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
        raise typer.BadParameter(f"`{root}` is not a directory", param_hint="--root")
    if not (root / DESCRIPTION).is_file():
        # Without it nothing says which interpreter, user and environment the files belong to.
        raise typer.BadParameter(f"`{root}` holds no {DESCRIPTION}", param_hint="--root")
    return root

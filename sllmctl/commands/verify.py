"""`sllmctl verify`: compare a checkpoint with the digests that its conversion took."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllmctl.commands.options import AsJson, StoragePath, quiet_option
from sllmctl.console import Console
from sllmctl.core.units import format_count, format_rate, format_seconds, format_size

if TYPE_CHECKING:
    from sllmctl.core.verify import VerifyReport

EXIT_PROBLEMS = 3


def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name below the storage path, or a path.")
    ],
    storage_path: StoragePath = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, quiet_option("ok, or the number of problems")] = False,
) -> None:
    """Find every damaged byte of a checkpoint.

    Exits with 3 if anything is damaged.

    Examples:

      sllmctl verify Qwen/Qwen3-8B

      sllmctl verify ./models/qwen3-8b --json
    """
    from sllmctl.core.config import resolve_model
    from sllmctl.core.verify import verify as verify_checkpoint

    console = Console.choose(as_json=as_json, quiet=quiet)
    path = resolve_model(model, storage_path)
    with console.progress() as progress:
        report = verify_checkpoint(path, progress=progress)
    for warning in report.warnings:
        console.warn(warning.message)
    console.result(
        _document(model, report),
        quiet="ok" if report.ok else f"{len(report.problems)} problems",
        human=_lines(model, report),
    )
    if not report.ok:
        raise typer.Exit(EXIT_PROBLEMS)


def _document(model: str, report: VerifyReport) -> dict[str, Any]:
    return {
        "schema": "sllmctl.verify/1",
        "model": model,
        "path": str(report.path),
        "ok": report.ok,
        "checked": report.checked,
        "problems": [asdict(problem) for problem in report.problems],
        "warnings": [asdict(warning) for warning in report.warnings],
        "tensors": report.tensors,
        "bytes": report.bytes,
        "elapsed_s": report.elapsed_s,
    }


def _lines(model: str, report: VerifyReport) -> list[str]:
    if not report.ok:
        count = len(report.problems)
        return [
            f"{model}: {format_count(count, 'problem')}",
            *(f"  {problem.message}" for problem in report.problems),
            "",
            "convert it again with --force, or copy the damaged files again",
        ]
    if report.checked == "structure":
        return [
            f"{model}: {format_count(report.tensors, 'tensor')}, structure checked",
            "  there are no digests to compare bytes with: sllmctl did not convert it",
        ]
    return [
        f"{model}: every byte is as it was written",
        f"  {format_count(report.tensors, 'tensor')}, {format_size(report.bytes)} in "
        f"{format_seconds(report.elapsed_s)} - {format_rate(report.bytes, report.elapsed_s)}",
    ]

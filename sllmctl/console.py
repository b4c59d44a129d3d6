"""The one place that formats output: for people, as JSON, or as the one value a script wants.

Results go to stdout; progress, warnings, hints and logs to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

from sllmctl.core.header import is_unicode
from sllmctl.core.progress import ProgressFn
from sllmctl.core.units import format_rate, format_seconds, format_size
from sllmctl.errors import SllmError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

PROGRESS_LINE_EVERY_S = 10.0
_STAGES = {
    "download": "downloading",
    "convert": "converting",
    "verify": "verifying",
    "read": "reading",
}


class Format(Enum):
    """How results are written to stdout."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class Console:
    """Writes results, progress and errors in the chosen format."""

    def __init__(self, output: Format = Format.HUMAN) -> None:
        self.format = output

    @classmethod
    def choose(cls, *, as_json: bool, quiet: bool) -> Console:
        """The console for a command's `--json` and `--quiet`; `--json` wins."""
        return cls(Format.JSON if as_json else Format.QUIET if quiet else Format.HUMAN)

    def result(self, document: dict[str, Any], *, quiet: object, human: Sequence[str]) -> None:
        """Write a command's result: the document, the one value, or lines for people."""
        if self.format is Format.JSON:
            print(_json(document))
        elif self.format is Format.QUIET:
            if quiet != "":
                print(quiet)
        else:
            for line in human:
                print(line)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        """Lay out a table for people; columns whose name starts with ``>`` are right-aligned."""
        titles = [column.lstrip(">") for column in columns]
        widths = [
            max([_width(titles[i]), *(_width(row[i]) for row in rows)]) for i in range(len(titles))
        ]
        lines = []
        for row in [titles, *rows]:
            cells = [
                " " * (width - _width(cell)) + cell
                if column.startswith(">")
                else cell + " " * (width - _width(cell))
                for column, cell, width in zip(columns, row, widths, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        return lines

    def clear(self) -> None:
        """Begin a new picture, where people look at a terminal; JSON goes on line by line."""
        if self.format is Format.HUMAN and sys.stdout.isatty():
            _rich(stderr=False).clear()
        sys.stdout.flush()

    def warn(self, message: str) -> None:
        """Say something on stderr that does not change the result."""
        print(f"warning: {message}", file=sys.stderr)

    def error(self, exc: SllmError, exit_code: int) -> None:
        """Report a failure: one line and a hint on stderr, and the document under `--json`."""
        print(f"error: {exc}", file=sys.stderr)
        if exc.hint:
            print(f"\nhint: {exc.hint}", file=sys.stderr)
        if self.format is Format.JSON:
            document = {
                "schema": "sllmctl.error/1",
                "kind": exc.kind,
                "message": str(exc),
                "hint": exc.hint,
                "exit_code": exit_code,
            }
            print(_json(document))

    @contextmanager
    def progress(self) -> Iterator[ProgressFn | None]:
        """Show how far long work is: a bar on a terminal, a line now and then elsewhere.

        None when nobody wants to see it: under `--quiet`, or with `SLLMCTL_NO_PROGRESS`.
        """
        if self.format is Format.QUIET or os.environ.get("SLLMCTL_NO_PROGRESS"):
            yield None
        elif sys.stderr.isatty():
            with _bars() as show:
                yield show
        else:
            yield _Lines().show

    @contextmanager
    def steps(self) -> Iterator[Callable[[str], None]]:
        """Say what long work is at: one line that changes on a terminal, a new one now and then
        elsewhere, nothing under `--quiet` or with `SLLMCTL_NO_PROGRESS`.
        """
        if self.format is Format.QUIET or os.environ.get("SLLMCTL_NO_PROGRESS"):
            yield lambda text: None
        elif sys.stderr.isatty():
            with _rich(stderr=True).status("") as status:
                yield lambda text: status.update(text.replace("[", "\\["))
        else:
            yield _Steps().show


class _Steps:
    """Steps where there is no terminal: the first, and one every ten seconds."""

    def __init__(self) -> None:
        self._last = -PROGRESS_LINE_EVERY_S

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_LINE_EVERY_S:
            self._last = now
            print(text, file=sys.stderr, flush=True)


class _Lines:
    """Progress where there is no terminal: a line a stage, and one every ten seconds."""

    def __init__(self) -> None:
        self._stage = ""
        self._done_bytes = 0
        self._started = self._last = 0.0

    def show(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        again = stage != self._stage or done_bytes < self._done_bytes
        self._stage, self._done_bytes = stage, done_bytes
        if again:
            self._started = self._last = now
            return
        if now - self._last < PROGRESS_LINE_EVERY_S:
            return
        self._last = now
        elapsed = now - self._started
        left = (total_bytes - done_bytes) * elapsed / done_bytes if done_bytes else 0
        print(
            f"{_STAGES.get(stage, stage)}: {format_size(done_bytes)} of "
            f"{format_size(total_bytes)}, {format_rate(done_bytes, elapsed)}, "
            f"{format_seconds(left)} left",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def _bars() -> Iterator[ProgressFn]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=_rich(stderr=True),
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def show(stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(_STAGES.get(stage, stage), total=total_bytes)
        bars.update(tasks[stage], completed=done_bytes, total=total_bytes)

    with bars:
        yield show


def _rich(*, stderr: bool) -> RichConsole:
    from rich.console import Console as RichConsole

    return RichConsole(stderr=stderr)


def _json(document: dict[str, Any]) -> str:
    text = json.dumps(document, ensure_ascii=False)
    return text if is_unicode(text) else json.dumps(document)


def _width(text: str) -> int:
    """Columns that a text takes on a terminal: Chinese characters take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)

"""The files of a report: the document, a chart a mode, and one page with everything."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sllmctl.bench import tables
from sllmctl.bench.document import Document, modes
from sllmctl.bench.html import page
from sllmctl.bench.svg import chart
from sllmctl.errors import ConfigError

RESULTS, REPORT = "results.json", "report.html"


def write_report(document: Document, directory: Path) -> list[Path]:
    """Write ``results.json``, ``report.html`` and ``MODE.svg``.

    Returns:
        The files.

    Raises:
        ConfigError: The directory cannot be written to.
    """
    texts = {
        RESULTS: json.dumps(document, ensure_ascii=False, indent=1) + "\n",
        REPORT: page(document),
    }
    for mode, groups in modes(document):
        texts[f"{mode}.svg"] = chart(f"{mode}: {tables.title_line(document)}", groups)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [_write(directory / name, text) for name, text in texts.items()]
    except OSError as exc:
        raise ConfigError(f"cannot write to `{directory}`: {exc.strerror}") from exc


def check_directory(directory: Path) -> None:
    """Find out before the run whether a report can be written.

    Raises:
        ConfigError: It cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"cannot make `{directory}`: {exc.strerror}") from exc
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"cannot write to `{directory}`")


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path

"""A report as one HTML file: charts, tables, budgets, the machine, and the document itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape

from sllmctl.bench import tables
from sllmctl.bench.document import Document, modes
from sllmctl.bench.svg import chart

_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Arial, sans-serif;
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .2rem; }
p { max-width: 48rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #d1d9e0; text-align: left;
  vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } .right { text-align: right; white-space: nowrap; }
tr.ours td:first-child { font-weight: 600; color: #1a7f37; }
tr.limit td { color: #656d76; }
td.bad { font-weight: 600; }
svg { max-width: 100%; height: auto; }
footer, .quiet { color: #656d76; font-size: 13px; }
"""


def page(document: Document) -> str:
    """The whole file. It loads nothing from anywhere."""
    title = f"sllmctl bench: {tables.title_line(document)}"
    raw = json.dumps(document, ensure_ascii=False).replace("<", "\\u003c")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            "<h1>sllmctl bench</h1>",
            f"<p>{escape(tables.title_line(document))}.</p>",
            f'<p class="quiet">{escape(tables.method_line(document))}</p>',
            *_compared(document),
            *_modes(document),
            *_budgets(document),
            "<h2>Machine</h2>",
            _table(tables.machine_table(document)),
            *_imports(document),
            '<h2>Data</h2><p class="quiet">Every sample is in this file, as JSON in the '
            "element <code>results</code>.</p>",
            f'<script type="application/json" id="results">{raw}</script>',
            "</body></html>\n",
        ]
    )


def _compared(document: Document) -> Iterator[str]:
    if line := tables.compared_line(document):
        yield f"<p>{escape(line)}</p>"


def _modes(document: Document) -> Iterator[str]:
    for mode, groups in modes(document):
        yield f"<h2>{escape(mode.capitalize())}</h2>"
        yield chart(f"{mode}: {document['checkpoint']['name']}", groups, dark=False)
        for group in groups:
            yield f"<h3>{escape(group['title'])}</h3><p>{escape(group['question'])}</p>"
            rows = tables.measured_rows(group)
            if rows:
                table = tables.group_table(group, full=True)
                yield _table(table, [row["kind"] for row in rows])
            for line in tables.group_notes(group):
                yield f'<p class="quiet">{escape(line)}</p>'


def _budgets(document: Document) -> Iterator[str]:
    if document["budgets"]:
        yield "<h2>Budgets</h2>"
        yield _table(tables.budget_table(document))


def _imports(document: Document) -> Iterator[str]:
    if document["imports"]:
        yield "<h2>Imports</h2>"
        yield _table(tables.import_table(document))


def _table(table: tables.Table, kinds: list[str] | None = None) -> str:
    columns, rows = table
    right = [column.startswith(">") for column in columns]

    def line(tag: str, cells: list[str], kind: str = "") -> str:
        inner = "".join(
            f"<{tag}{_class(cell, is_right)}>{escape(cell)}</{tag}>"
            for cell, is_right in zip(cells, right, strict=True)
        )
        return f'<tr class="{kind}">{inner}</tr>'

    body = [line("td", row, kinds[number] if kinds else "") for number, row in enumerate(rows)]
    head = line("th", [column.lstrip(">") for column in columns])
    inner = f"<thead>{head}</thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="table"><table>{inner}</table></div>'


def _class(cell: str, is_right: bool) -> str:
    names = ["right"] * is_right + ["bad"] * (cell == "not met")
    return f' class="{" ".join(names)}"' if names else ""

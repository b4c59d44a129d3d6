"""The tables of a run for a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterator

from sllmctl.bench import tables
from sllmctl.bench.document import Document, modes

BEGIN = "<!-- Written from benchmarks/results.json by `python -m docs.generate`. -->"
END = "<!-- End of what is written from benchmarks/results.json. -->"


def fill(page: str, document: Document | None) -> str:
    """Put a run's tables between the marks of a page; nothing where there is no run."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    inner = "\n\n".join(_parts(document)) + "\n\n" if document else ""
    return f"{before}{BEGIN}\n\n{inner}{END}{after}"


def _parts(document: Document) -> Iterator[str]:
    yield f"{tables.title_line(document)}."
    yield tables.method_line(document)
    for mode, groups in modes(document):
        if mode != "load":
            yield f"### {mode.capitalize()}"
        yield f"![{mode}: {tables.title_line(document)}](benchmarks/{mode}.svg)"
        for group in groups:
            yield f"**{group['title'].capitalize()}.** {group['question']}"
            if tables.measured_rows(group):
                yield _table(tables.group_table(group))
            if notes := tables.group_notes(group):
                yield " ".join(notes)
    if document["budgets"]:
        yield "### Budgets"
        yield _table(tables.budget_table(document))
    yield "### Machine"
    yield _table(tables.machine_table(document))
    if document["imports"]:
        yield _table(tables.import_table(document))


def _table(table: tables.Table) -> str:
    columns, rows = table
    marks = ["---:" if column.startswith(">") else "---" for column in columns]
    lines = [[column.lstrip(">") for column in columns], marks, *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)

"""`docs/reference/checks.md`, made from the checks.

`python -m sllmctl.doctor.reference > docs/reference/checks.md` brings it up to date.
"""

from __future__ import annotations

import sys

import sllmctl.doctor.all_checks  # noqa: F401  (registers them)
from sllmctl.doctor.check import CHECKS, GROUPS
from sllmctl.doctor.tables import load_tables
from sllmctl.doctor.view import TOUCHES


def page() -> str:
    """The whole page, as Markdown."""
    tables = load_tables()
    out = [
        "# Checks of `sllmctl doctor`",
        "",
        "An ID is permanent: one that is retired is never used again. `--only` and `--skip` take "
        "IDs and their beginnings, `--explain ID` prints what is here.",
        "",
        f"Version tables are of {tables.date}; what is newer than they know is a note, never a "
        "failure.",
    ]
    for group, title in GROUPS.items():
        out += ["", f"## {title}"]
        for check in (c for c in CHECKS.values() if c.group == group):
            needs = f", needs {', '.join(check.needs)}" if check.needs else ""
            out += [
                "",
                f"### {check.id}: {check.title}",
                "",
                f"{_sentence(check.why)} Looks at {check.looks_at}.",
                "",
                f"At worst: {check.severity.value}. Profiles: {', '.join(check.profiles)}{needs}. "
                f"Touches {TOUCHES[check.level]}{', and the network' if check.network else ''}.",
            ]
    out += [
        "",
        "## Known lines of error logs",
        "",
        "`sllmctl doctor --log FILE` knows these.",
        "",
        "| line matches | cause | checks |",
        "|---|---|---|",
    ]
    for signature in tables.signatures:
        pattern = signature.pattern.replace("|", "\\|")
        out.append(f"| `{pattern}` | {signature.cause} | {', '.join(signature.checks) or '-'} |")
    return "\n".join(out) + "\n"


def _sentence(text: str) -> str:
    word = text.split()[0]
    return (text if not word.isalpha() else text[0].upper() + text[1:]) + "."


if __name__ == "__main__":
    sys.stdout.write(page())

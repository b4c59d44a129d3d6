"""Text on a terminal: columns, line breaks, and colour where it is wanted."""

from __future__ import annotations

import re

from sllmctl.doctor.check import Status

# ANSI colours that terminals show on dark and light ground alike.
_COLOURS = {
    Status.PASS: "32",
    Status.INFO: "36",
    Status.WARN: "33",
    Status.FAIL: "31",
    Status.ERROR: "31",
    Status.SKIP: "2",
}
_WORDS = re.compile(r" +|[\u2e80-\uffff]|[^ \u2e80-\uffff]+")
_KEPT = "\xa0"  # a blank at which no line is broken
_NEVER_FIRST = "，。：；！？、）》”"


def width_of(text: str) -> int:
    """Columns on a terminal: Chinese characters take two."""
    return sum(2 if ord(c) > 0x2E7F else 1 for c in text)


def pad(text: str, columns: int) -> str:
    """The text, with blanks up to so many columns."""
    return text + " " * (columns - width_of(text))


def wrap(lead: str, text: str, columns: int) -> list[str]:
    """A text after its lead, broken into lines; the later ones begin below the text's start.

    Args:
        lead: What stands before the text, blanks included.
        text: Words, or Chinese, which may be broken between any two characters.
        columns: Of the terminal; 0 leaves the text on one line.
    """
    indent = width_of(lead)
    lines, line, used = [lead], "", 0
    if columns <= 0 or width_of(text) <= columns - indent:
        return [f"{lead}{text}".replace(_KEPT, " ")]
    for word in _WORDS.findall(text):
        wide = width_of(word)
        if indent + used + wide > columns and used and word not in _NEVER_FIRST:
            lines[-1] += line.rstrip()
            lines.append(" " * indent)
            line, used = "", 0
            if word.isspace():
                continue
        line, used = line + word, used + wide
    lines[-1] += line.rstrip()
    return [line.replace(_KEPT, " ") for line in lines]


def together(text: str) -> str:
    """The text, to be kept on one line."""
    return text.replace(" ", _KEPT)


def coloured(text: str, status: Status) -> str:
    """The text in the colour of a status."""
    return f"\x1b[{_COLOURS[status]}m{text}\x1b[0m"


def dim(text: str) -> str:
    """The text, less bright."""
    return f"\x1b[2m{text}\x1b[0m"

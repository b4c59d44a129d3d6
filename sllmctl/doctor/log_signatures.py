"""Explaining an error log: known lines, their causes, and the checks that look for them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO

from sllmctl.doctor.tables import Tables
from sllmctl.doctor.text import Text, say

LINE_CHARS = 2000
# A bare number is a code only beside a word that says so: sizes and process ids are numbers too.
_CODE = r"\b(?:err(?:or)?|ret(?:urn(?:ed)?|code)?|rtn|code|result)\b[^\n]{{0,24}}?\b{0}\b"
_TIMES = r"(?:[?*+]|\{[\d,]*\})"
_NUMBER = re.compile(r"<(\d{5,6})>")
_TRAILER = re.compile(r"\bERR(\d{2})(\d{3})\b")
_EXCEPTION = re.compile(r"^\s*(?:[\w.]+(?:Error|Exception|Interrupt|Exit)\b.*|terminate called.*)$")
_NOTHING = "ERR99999"

# The trailer that torch_npu prints after an exception.
# Source: torch_npu/csrc/core/npu/NPUException.h
MODULES = {"00": "PTA", "01": "OPS", "02": "DIST", "03": "GRAPH", "04": "PROF", "99": "UNKNOWN"}
KINDS = {
    "001": "invalid parameter", "002": "invalid type", "003": "invalid value",
    "004": "invalid pointer", "005": "internal error", "006": "memory error",
    "007": "feature not supported", "008": "resource not found", "009": "resource unavailable",
    "010": "system call failed", "011": "timeout", "012": "permission denied",
    "100": "a call of the ACL API failed", "200": "a call of the HCCL API failed",
    "300": "a call of the GE API failed",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Match:
    """A known line: where it stands first, how often, what it means, which checks to look at."""

    id: str
    line_number: int
    line: str
    count: int
    cause: Text
    checks: tuple[str, ...]


def lines_of(source: TextIO) -> Iterator[str]:
    """The lines of a log, each up to `LINE_CHARS`: one of a gigabyte takes no more memory."""
    while line := source.readline(LINE_CHARS):
        yield line
        while line and not line.endswith("\n"):
            line = source.readline(LINE_CHARS)


def read_log(lines: Iterable[str], tables: Tables) -> list[Match]:
    """Find the known lines of a log, in their order; each signature once.

    Where nothing is known but torch_npu's `ERR99999` stands (it follows every exception and says
    nothing), the exception before it is returned, as signature "".
    """
    known = [(s, *_prepared(s.pattern)) for s in tables.signatures]
    telling = list(dict.fromkeys(word for _, words, _ in known for word in words))
    found: dict[str, Match] = {}
    before: tuple[int, str] | None = None
    unknown: tuple[int, str] | None = None
    for number, raw in enumerate(lines, 1):
        line = raw.rstrip()
        if _NOTHING in line:
            unknown = unknown or before
            continue
        if _EXCEPTION.match(line):
            before = number, line
        hit = None
        if any(map(line.__contains__, telling)):  # nearly no line is worth a closer look
            hit = next(
                (
                    signature
                    for signature, words, pattern in known
                    if any(word in line for word in words) and pattern.search(line)
                ),
                None,
            )
        if hit is not None:
            _add(found, hit.id, number, line, say(hit.cause), hit.checks)
        elif match := _TRAILER.search(line):
            kind = KINDS.get(match[2])
            if kind and match[1] in MODULES:
                cause = say("torch_npu ({module}): {kind}", module=MODULES[match[1]], kind=kind)
                _add(found, match[0], number, line, cause, ())
    if not found and unknown:
        cause = say("this is the real error; ERR99999 after it says nothing")
        found[""] = Match("", unknown[0], unknown[1].strip(), 1, cause, ())
    return list(found.values())


def _add(
    found: dict[str, Match],
    id: str,  # noqa: A002
    number: int,
    line: str,
    cause: Text,
    checks: tuple[str, ...],
) -> None:
    if id in found:
        old = found[id]
        found[id] = Match(id, old.line_number, old.line, old.count + 1, cause, checks)
    else:
        found[id] = Match(id, number, line.strip(), 1, cause, checks)


@functools.cache
def _prepared(pattern: str) -> tuple[list[str], re.Pattern[str]]:
    """What a line must hold for a pattern, and the pattern itself."""
    whole = _NUMBER.sub(lambda match: "(?i:" + _CODE.format(match[1]) + ")", pattern)
    return _words(pattern), re.compile(whole)


def _words(pattern: str) -> list[str]:
    """For each alternative of a pattern the longest text that a matching line must hold.

    Looking for these first makes a log of a million lines a matter of seconds.
    """
    return [_longest(alternative) for alternative in _alternatives(_NUMBER.sub(r"\1", pattern))]


def _alternatives(pattern: str) -> list[str]:
    """The parts between the bars that stand outside of parentheses."""
    parts, depth, skip = [""], 0, False
    for char in pattern:
        depth += 0 if skip else (char == "(") - (char == ")")
        if char == "|" and depth == 0 and not skip:
            parts.append("")
        else:
            parts[-1] += char
        skip = char == "\\" and not skip
    return parts


def _longest(alternative: str) -> str:
    text = re.sub(rf"\\[bBwWdDsS]{_TIMES}?", "\0", alternative)
    while (shorter := re.sub(rf"(?<!\\)\((?:\\.|[^()\\])*\){_TIMES}?", "\0", text)) != text:
        text = shorter
    for variable in (
        rf"\[[^\]]*\]{_TIMES}?", rf"(?<!\\)\.{_TIMES}?", rf"(?<!\\)[^\\\0]{_TIMES}",
    ):  # fmt: skip
        text = re.sub(variable, "\0", text)
    return max(re.sub(r"\\(.)", r"\1", text).split("\0"), key=len)

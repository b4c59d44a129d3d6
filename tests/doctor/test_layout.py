"""Lines on a terminal: broken where they must be, at the right column, in any language."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sllmctl.doctor.check import Status
from sllmctl.doctor.examine import examine
from sllmctl.doctor.layout import pad, width_of, wrap
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.redact import hide_secrets
from sllmctl.doctor.tree_probe import TreeProbe
from sllmctl.doctor.view import MARKS, View, lines
from tests.doctor.pictures import PICTURES, path, svg

Make = Callable[[str], Path]
BROKEN = "guide 1, with vLLM installed"
ALONE = ("seen:", "fix:", "依据：", "修复：", "$ ", "sllmctl doctor")  # what is copied whole


def test_words_go_to_the_next_line_below_the_first() -> None:
    assert wrap("why: ", "one two three four", 14) == ["why: one two", "     three", "     four"]
    assert wrap("why: ", "one two", 0) == ["why: one two"]
    assert wrap("", "a" * 30, 10) == ["a" * 30]


def test_chinese_breaks_anywhere_but_before_a_comma() -> None:
    assert wrap("原因：", "驱动与固件，配套", 16) == ["原因：驱动与固件，", "      配套"]
    assert wrap("", "加载 checkpoint 到卡", 10) == ["加载", "checkpoint", "到卡"]
    assert (width_of("卡a"), pad("卡", 4)) == (3, "卡  ")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_line_but_what_is_copied_is_wider_than_the_terminal(
    machine: Make, language: str
) -> None:
    done = examine(Machine(TreeProbe(machine(BROKEN))))
    view = View(language, True, hide_secrets, columns=80)
    wide = [line for line in lines(done, view) if width_of(line) > 80]
    assert [line for line in wide if not line.strip().startswith(ALONE)] == []


def test_colours_say_what_the_marks_say(machine: Make) -> None:
    done = examine(Machine(TreeProbe(machine(BROKEN))))
    plain = lines(done, View("en", True, hide_secrets))
    bright = lines(done, View("en", True, hide_secrets, colour=True))
    codes = {"\x1b[32m": Status.PASS, "\x1b[33m": Status.WARN, "\x1b[31m": Status.FAIL}
    for line, same in zip(bright, plain, strict=True):
        text = line.replace("\x1b[0m", "").replace("\x1b[2m", "")
        for code, status in codes.items():
            assert (code in text) == (f"{code}{MARKS[status][0]}" in text)
            text = text.replace(code, "")
        assert text == same


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_of_the_guides_are_fresh(name: str, language: str) -> None:
    shown = path(name, language).read_text(encoding="utf-8")
    assert shown == svg(name, language), "run: python -m tests.doctor.pictures"

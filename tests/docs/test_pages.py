"""Links lead somewhere, and commands in the pages exist with the options that they are given."""

from __future__ import annotations

import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sllmctl import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS: Any = typer.main.get_command(cli.app)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and GitLab make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    found = set()
    for title in titles:
        kept = re.sub(r"[^\w\- ]", "", title.lower())
        found.add(kept.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists() or (anchor and anchor not in anchors(to)):
            broken.append(target)
    assert not broken


def command_lines(page: Path) -> Iterator[str]:
    """Every line of a `console` block that runs sllmctl."""
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        joined = block.replace("\\\n", " ")
        for line in re.findall(r"^\$ (.*)$", joined, re.MULTILINE):
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                del words[0]
            if words and words[0] == "sllmctl":
                yield shlex.join(words)


LINES = [(page, line) for page in PAGES for line in command_lines(page)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{name_of(p)}: {w}" for p, w in LINES])
def test_a_command_in_a_page_is_one(page: Path, line: str) -> None:
    """The command line's own parser takes it: names, options, choices and numbers."""
    arguments = shlex.split(line)[1:]
    if arguments[0].startswith("-"):
        known = {name for parameter in COMMANDS.params for name in parameter.opts} | {"--help"}
        assert set(arguments) <= known
        return
    name, *rest = arguments[: arguments.index("&")] if "&" in arguments else arguments
    COMMANDS.commands[name].make_context(name, rest)


def test_there_are_commands_to_look_at() -> None:
    assert len(LINES) > 20


def test_figures_say_in_words_what_they_show() -> None:
    figures = list((ROOT / "docs" / "figures").glob("*.svg"))
    assert figures
    for figure in figures:
        root = ElementTree.parse(figure).getroot()
        kinds = {child.tag.rpartition("}")[2]: child for child in root}
        assert kinds["title"].text
        assert kinds["desc"].text
        assert "prefers-color-scheme: dark" in (kinds["style"].text or "")


def test_every_page_can_be_reached_from_the_index() -> None:
    reached: set[Path] = set()
    ahead = [ROOT / "docs" / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in reached:
            continue
        reached.add(page)
        for target in re.findall(r"\]\(([^)\s#:]+)[^)]*\)", without_code(page.read_text())):
            to = (page.parent / target).resolve()
            if to.suffix == ".md":
                ahead.append(to)
    assert {page for page in PAGES if page.parent != ROOT} <= reached

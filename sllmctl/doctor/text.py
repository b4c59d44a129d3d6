"""Sentences for people, in English and Chinese: the English template is the key."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

LANGUAGES = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Text:
    """A template and the values that go into it; ``str(text)`` is English."""

    template: str
    values: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.render("en")

    def render(self, language: str) -> str:
        """The sentence in a language; one without a translation stays English."""
        values = {
            name: value.render(language) if isinstance(value, Text) else value
            for name, value in self.values
        }
        return translate(self.template, language).format(**values)


def say(template: str, **values: Any) -> Text:
    """A sentence for people. Write the template as a literal: a test looks for its translation."""
    return Text(template, tuple(values.items()))


def translate(template: str, language: str) -> str:
    """A template in another language, or itself."""
    return template if language == "en" else _catalogue(language).get(template, template)


@functools.cache
def _catalogue(language: str) -> dict[str, str]:
    data = resources.files("sllmctl.doctor") / f"text_{language}.json"
    catalogue: dict[str, str] = json.loads(data.read_text(encoding="utf-8"))
    return catalogue


def language_of(environment: dict[str, str]) -> str:
    """The language that a person's locale asks for: ``zh``, else ``en``."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        value = environment.get(name, "")
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"

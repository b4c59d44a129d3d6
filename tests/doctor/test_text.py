"""Every sentence exists in Chinese too, with the same values in it."""

from __future__ import annotations

import json
import re

import pytest

from sllmctl.doctor.check import CHECKS, GROUPS, PROFILES, Status
from sllmctl.doctor.tables import load_tables
from sllmctl.doctor.text import language_of, say, translate
from tests.doctor.templates import PACKAGE, all_templates

CATALOGUE = json.loads((PACKAGE / "doctor" / "text_zh.json").read_text(encoding="utf-8"))


def test_every_sentence_is_translated_and_none_is_left_over() -> None:
    assert all_templates() - set(CATALOGUE) == set()
    assert set(CATALOGUE) - all_templates() == set()


def test_a_translation_has_the_same_values() -> None:
    for template, chinese in CATALOGUE.items():
        assert set(re.findall(r"{\w+}", chinese)) == set(re.findall(r"{\w+}", template)), template


def test_sentences_within_sentences_are_translated() -> None:
    inner = say("there is no CANN on this machine")
    assert say("One thing is broken: {what}.", what=inner).render("zh") == (
        "有一处故障：本机没有 CANN。"
    )
    assert translate("no such sentence", "zh") == "no such sentence"


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LC_MESSAGES": "zh_TW"}, "zh"),
        ({}, "en"),
    ],
)
def test_the_locale_chooses_the_language(environment: dict[str, str], language: str) -> None:
    assert language_of(environment) == language


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda c: c.id)
def test_a_check_says_what_it_is(check: object) -> None:
    found = CHECKS[check.id]  # type: ignore[attr-defined]
    assert re.fullmatch(r"[A-Z]+\d{3}", found.id)
    assert found.group in GROUPS
    assert found.title and found.why and found.looks_at and found.profiles
    assert set(found.profiles) <= set(PROFILES)
    assert set(found.needs) <= set(CHECKS)
    assert found.severity in (Status.INFO, Status.WARN, Status.FAIL)


def test_signatures_name_checks_that_exist() -> None:
    signatures = load_tables().signatures
    assert {check for s in signatures for check in s.checks} <= set(CHECKS)
    assert len({s.id for s in signatures}) == len(signatures)

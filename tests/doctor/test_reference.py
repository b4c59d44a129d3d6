"""The page of all checks says what the checks say."""

from __future__ import annotations

from pathlib import Path

from sllmctl.doctor.reference import page

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "checks.md"


def test_the_page_of_checks_is_fresh() -> None:
    assert PAGE.read_text() == page(), "run: python -m sllmctl.doctor.reference > " + str(PAGE)

"""What a run's document becomes: a page, a chart, tables, and marks beside an earlier run."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllmctl.bench import markdown, tables
from sllmctl.bench.document import compare, part_of_limit, ratio_to_reference, read_document
from sllmctl.bench.html import page
from sllmctl.bench.report import write_report
from sllmctl.bench.rows import Group
from sllmctl.bench.svg import chart
from sllmctl.errors import ConfigError

TIMES = {
    "raw": [1.0, 1.1, 1.2],
    "sllmctl": [1.5, 1.6, 1.7],
    "safetensors": [3.0, 3.2, 3.4],
    "broken": [],
}


@pytest.fixture
def document(make_group: Callable[..., Group], make_document: Any) -> dict[str, Any]:
    group = make_group(TIMES)
    group.rows[-1].problem = "not installed: <x>"
    made: dict[str, Any] = make_document(group)
    return made


def test_ratios_are_to_the_reference_and_the_limit(document: dict[str, Any]) -> None:
    (group,) = document["groups"]
    row = next(row for row in group["rows"] if row["name"] == "sllmctl")
    assert ratio_to_reference(group, row) == pytest.approx(2.0)
    assert part_of_limit(group, row) == pytest.approx(1.1 / 1.6)


def test_rows_that_are_not_ranked_are_compared_with_their_like(
    make_group: Callable[..., Group],
) -> None:
    group = make_group(
        {"x": [1.0], "sllmctl, 4 files": [2.0], "safetensors, 4 files": [6.0], "safetensors, 1": []}
    )
    group.ranked = False
    shown = group.document()
    row = next(row for row in shown["rows"] if row["name"] == "sllmctl, 4 files")
    assert ratio_to_reference(shown, row) == pytest.approx(3.0)


def test_the_table_leaves_out_what_nobody_has(document: dict[str, Any]) -> None:
    (group,) = document["groups"]
    columns, rows = tables.group_table(group)
    assert len(rows) == 3
    assert "change" not in columns and ">from disk" not in columns and ">CPU" in columns
    assert ">from disk" in tables.group_table(group, full=True)[0]
    assert tables.group_notes(group) == ["broken, not measured: not installed: <x>."]


def test_the_page_is_one_file_that_loads_nothing(document: dict[str, Any]) -> None:
    text = page(document)
    assert "<b>model</b>" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r'(?:src|href)="|url\(|@import', text)
    embedded = re.findall(r'id="results">(.*?)</script>', text, re.S)
    assert json.loads(embedded[0]) == document


def test_the_chart_says_in_words_what_it_shows(document: dict[str, Any]) -> None:
    root = ElementTree.fromstring(chart("Cold & hot", document["groups"]))
    kinds = {child.tag.rpartition("}")[2]: child for child in root}
    assert kinds["title"].text == "Cold & hot"
    assert "sllmctl 1.6 s" in (kinds["desc"].text or "")
    bars = [child for child in root if child.get("height") == "15"]
    lengths = [float(bar.get("width") or 0) for bar in bars]
    assert lengths == sorted(lengths) and len(lengths) == 3
    assert lengths[2] == pytest.approx(2 * lengths[1], rel=0.01)


def test_rows_far_apart_get_a_logarithmic_scale(make_group: Callable[..., Group]) -> None:
    group = make_group({"raw": [0.001], "sllmctl": [0.002], "safetensors": [10.0]}).document()
    text = chart("t", [group])
    assert "logarithmic" in text
    assert min(float(w) for w in re.findall(r'width="([\d.]+)" height="15"', text)) > 20


@pytest.mark.parametrize(
    ("now", "change"), [(1.0, "faster"), (1.45, "same"), (1.65, "same"), (2.0, "slower")]
)
def test_a_row_changed_when_all_its_samples_lie_outside_the_old_ones(
    document: dict[str, Any],
    make_group: Callable[..., Group],
    make_document: Any,
    now: float,
    change: str,
) -> None:
    new = make_document(make_group({**TIMES, "sllmctl": [now, now + 0.1], "new": [1.0]}))
    compare(new, document, "old.json")
    rows = {row["name"]: row for row in new["groups"][0]["rows"]}
    assert rows["sllmctl"]["change"] == change
    assert rows["safetensors"]["change"] == "same"
    assert rows["new"]["change"] == "new"
    assert rows["broken"]["change"] is None
    assert "change" in tables.group_table(new["groups"][0])[0]


def test_another_machine_is_named(document: dict[str, Any]) -> None:
    new = copy.deepcopy(document)
    new["machine"] |= {"kernel": "Other", "load at the start": "9"}
    compare(new, document, "old.json")
    assert new["compared_with"]["other_machine"] == ["kernel"]
    assert "differ: kernel" in tables.compared_line(new)


def test_a_written_document_is_read_again_and_others_are_refused(
    document: dict[str, Any], tmp_path: Path
) -> None:
    files = write_report(document, tmp_path / "new" / "report")
    assert {file.name for file in files} == {"results.json", "report.html", "load.svg"}
    assert read_document(files[0]) == document
    (tmp_path / "other.json").write_text('{"schema": "sllmctl.load/1"}')
    for path in (tmp_path / "other.json", tmp_path / "missing.json", files[1]):
        with pytest.raises(ConfigError):
            read_document(path)


def test_filling_a_page_twice_is_filling_it_once(document: dict[str, Any]) -> None:
    empty = f"before\n\n{markdown.BEGIN}\n\n{markdown.END}\n\nafter\n"
    once = markdown.fill(empty, document)
    assert "| sllmctl 1.0 |" in once and "before" in once and "after" in once
    assert markdown.fill(once, document) == once
    assert markdown.fill(once, None) == empty

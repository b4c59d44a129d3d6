from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllmctl.core.units import (
    format_count,
    format_page_size,
    format_rate,
    format_seconds,
    format_size,
    parse_share,
    parse_size,
)
from sllmctl.errors import ConfigError, SllmError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096),
        ("4GB", 4 * 10**9),
        ("4GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("16M", 16 * 10**6),
        ("2TiB", 2 * 2**40),
        ("512 B", 512),
        (" 64k ", 64_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "4 GBs", "-1", "0", "0.1", "4iB", "1e9", "4G4", "9" * 30, "٤GB", "4\nGB"]
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


@given(st.text(max_size=12))
def test_no_text_breaks_the_parser(text: str) -> None:
    with contextlib.suppress(SllmError):
        assert parse_size(text) >= 1


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1_190_000_000, "1.19 GB"), (4096, "4.1 KB"), (5e15, "5e+03 TB")],
)
def test_sizes_have_three_digits(size_bytes: float, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("elapsed_s", "text"),
    [(0, "0 ms"), (0.0071, "7.1 ms"), (2.349, "2.35 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")],
)
def test_durations_read_as_people_say_them(elapsed_s: float, text: str) -> None:
    assert format_seconds(elapsed_s) == text


@pytest.mark.parametrize(
    ("page_bytes", "text"), [(4096, "4 KiB"), (65536, "64 KiB"), (2 << 20, "2 MiB")]
)
def test_pages_have_binary_sizes(page_bytes: int, text: str) -> None:
    assert format_page_size(page_bytes) == text


def test_a_rate_without_time_is_a_dash() -> None:
    assert format_rate(10, 0) == "-"
    assert format_rate(3e9, 2) == "1.5 GB/s"


def test_a_share_is_a_size_or_a_part() -> None:
    assert parse_share("50%", 1000) == parse_share(" 500 ", 1000) == 500
    for text in ("0%", "101%", "%", "-1%", "nan%"):
        with pytest.raises(ConfigError, match="no part of the memory"):
            parse_share(text, 1000)


def test_one_thing_is_no_plural() -> None:
    assert [format_count(number, "tensor") for number in (0, 1, 1366)] == [
        "0 tensors",
        "1 tensor",
        "1,366 tensors",
    ]

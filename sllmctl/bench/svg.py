"""A chart of a mode's groups: a bar a row, with its spread. SVG that needs nothing to be shown."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from sllmctl.bench.document import figure
from sllmctl.core.units import format_seconds

WIDTH, NAME_WIDTH, VALUE_WIDTH = 900, 250, 130
ROW_HEIGHT, HEAD_HEIGHT, GAP, MARGIN = 22, 30, 18, 20
_MEASURES = {"ready_s": "until ready", "all_s": "until every byte was read"}
_LOG_FROM = 50
"""A group whose slowest row takes so many times the fastest's time gets a logarithmic scale."""

_STYLE = """
    text { font: 13px system-ui, -apple-system, "Segoe UI", Arial, sans-serif; fill: #1f2328; }
    .head { font-weight: 600; }
    .small { font-size: 12px; fill: #57606a; }
    .paper { fill: #ffffff; }
    .ours { fill: #1a7f37; }
    .peer { fill: #80a4c9; }
    .limit { fill: #afb8c1; }
    .spread { stroke: #57606a; stroke-width: 1.4; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; }
      .small { fill: #9198a1; }
      .paper { fill: #0d1117; }
      .ours { fill: #3fb950; }
      .peer { fill: #3d6a99; }
      .limit { fill: #6e7681; }
      .spread { stroke: #c9d1d9; }
    }
  """


def chart(title: str, groups: list[dict[str, Any]], *, dark: bool = True) -> str:
    """Draw groups below each other, each on its own scale.

    Args:
        title: What the chart shows; also for those who cannot see it.
        groups: Of a document; rows without a figure are left out.
        dark: Whether the chart follows the reader's dark mode.
    """
    parts: list[str] = []
    y = MARGIN + 2 * HEAD_HEIGHT
    for group in groups:
        rows = [row for row in group["rows"] if figure(row, group["measure"])]
        if not rows:
            continue
        parts += _group(group, rows, y)
        y += HEAD_HEIGHT + ROW_HEIGHT * len(rows) + GAP
    height = y + MARGIN
    style = _STYLE if dark else _STYLE.partition("    @media")[0]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img" aria-labelledby="title about">',
            f'  <title id="title">{escape(title)}</title>',
            f'  <desc id="about">{escape(_in_words(groups))}</desc>',
            f"  <style>{style}</style>",
            f'  <rect class="paper" width="{WIDTH}" height="{height}" rx="6"/>',
            f'  <text class="head" x="{MARGIN}" y="{MARGIN + 8}">{escape(title)}</text>',
            *_legend(),
            *parts,
            "</svg>\n",
        ]
    )


def _legend() -> Iterator[str]:
    x, y = MARGIN, MARGIN + 24
    for kind, text, width in (
        ("ours", "sllmctl", 80),
        ("peer", "others", 76),
        ("limit", "the machine's limit", 0),
    ):
        yield f'  <rect class="{kind}" x="{x}" y="{y - 10}" width="12" height="12" rx="2"/>'
        yield f'  <text class="small" x="{x + 17}" y="{y}">{text}</text>'
        x += width


def _group(group: dict[str, Any], rows: list[dict[str, Any]], top: int) -> Iterator[str]:
    spreads = [figure(row, group["measure"]) or {} for row in rows]
    scale, is_log = _scale(spreads)
    kind = ", logarithmic" if is_log else ""
    measured = f"{_MEASURES[group['measure']]}{kind}; lines: fastest to slowest"
    y = top + 14
    yield f'  <text class="head" x="{MARGIN}" y="{y}">{escape(group["title"])}</text>'
    yield (
        f'  <text class="small" x="{WIDTH - MARGIN}" y="{y}" text-anchor="end">'
        f"{escape(measured)}</text>"
    )
    left = MARGIN + NAME_WIDTH
    for number, (row, spread) in enumerate(zip(rows, spreads, strict=True)):
        y = top + HEAD_HEIGHT + number * ROW_HEIGHT
        width = scale(spread["median"])
        yield (
            f'  <text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(row["name"])}</text>'
        )
        yield (
            f'  <rect class="{row["kind"]}" x="{left}" y="{y + 3}" width="{width:.1f}" '
            f'height="{ROW_HEIGHT - 7}" rx="2"/>'
        )
        low, high = left + scale(spread["min"]), left + scale(spread["max"])
        middle = y + ROW_HEIGHT / 2 - 0.5
        yield f'  <path class="spread" d="M{low:.1f} {middle}H{high:.1f}"/>'
        yield (
            f'  <text class="small" x="{max(high, left + width) + 8:.1f}" y="{y + 14}">'
            f"{format_seconds(spread['median'])}</text>"
        )


class _Scale:
    """Seconds to pixels."""

    def __init__(self, low: float, high: float, *, is_log: bool) -> None:
        self._low, self._high, self._is_log = low, high, is_log

    def __call__(self, seconds: float) -> float:
        from math import log

        room = WIDTH - 2 * MARGIN - NAME_WIDTH - VALUE_WIDTH
        if self._high <= 0:
            return 0.0
        if not self._is_log:
            return room * seconds / self._high
        first = self._low / 2  # so that the fastest row has a bar too
        return room * log(max(seconds, first) / first) / log(self._high / first)


def _scale(spreads: list[dict[str, float]]) -> tuple[_Scale, bool]:
    high = max(spread["max"] for spread in spreads)
    low = min(spread["min"] for spread in spreads)
    is_log = low > 0 and high > _LOG_FROM * low
    return _Scale(low, high, is_log=is_log), is_log


def _in_words(groups: list[dict[str, Any]]) -> str:
    return " ".join(
        f"{group['title']}, {_MEASURES[group['measure']]}: "
        + ", ".join(
            f"{row['name']} {format_seconds(spread['median'])}"
            for row in group["rows"]
            if (spread := figure(row, group["measure"]))
        )
        + "."
        for group in groups
    )

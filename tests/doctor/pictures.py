"""Pictures of what a person sees, for the guides: `python -m tests.doctor.pictures`.

Each run of characters gets its place from the columns before it, so that Chinese, which takes two
columns a character, stands where a terminal puts it, whatever font shows it.
"""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tests.doctor.all_scenarios  # noqa: F401  (registers them)
from sllmctl.doctor.examine import examine
from sllmctl.doctor.layout import width_of
from sllmctl.doctor.redact import hide_secrets
from sllmctl.doctor.view import View, lines
from tests.doctor.scenario import MEMORY, SCENARIOS, build

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
PICTURES = {
    "healthy": "healthy 8.1.RC1",
    "broken": "guide 2: torch_npu 2.6.0.post3 on CANN 8.2.RC1, a stub first",
}
COLUMNS = 100
_CELL, _LINE, _MARGIN = 8.4, 20, 16
_CLASSES = {"0": "t", "2": "dim", "31": "bad", "32": "good", "33": "warn", "36": "note"}
_STYLE = """
.bg { fill: #f6f8fa } .t { fill: #1f2328 } .dim { fill: #656d76 } .bad { fill: #cf222e }
.good { fill: #1a7f37 } .warn { fill: #9a6700 } .note { fill: #0969da }
@media (prefers-color-scheme: dark) {
.bg { fill: #1e1f22 } .t { fill: #d4d4d4 } .dim { fill: #8a8f98 } .bad { fill: #f47067 }
.good { fill: #6bc46d } .warn { fill: #daaa3f } .note { fill: #76a9fa } }
"""
_FONTS = (
    "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', 'Noto Sans Mono CJK SC', "
    "'Noto Sans CJK SC', 'Noto Sans CJK TC', 'PingFang SC', 'Microsoft YaHei', monospace"
)


def seen(name: str, language: str) -> list[str]:
    """What a terminal shows, in lines that it breaks where they are too wide for it."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        done = examine(build(SCENARIOS[PICTURES[name]], Path(directory)))
        view = View(language, True, hide_secrets, columns=COLUMNS, colour=True)
        found = [f"$ sllmctl doctor{' --lang zh' if language == 'zh' else ''}", *lines(done, view)]
    return [part for line in found for part in _folded(line)]


def _folded(line: str) -> list[str]:
    """A line as a terminal breaks it: at its last column, whatever stands there."""
    out, used, colour = [""], 0, ""
    for part in re.findall(r"\x1b\[\d*m|.", line):
        wide = 0 if part[0] == "\x1b" else width_of(part)
        if used + wide > COLUMNS:
            out.append(colour)
            used = 0
        colour = part if wide == 0 else colour
        out[-1] += part
        used += wide
    return out


def _runs(line: str) -> Iterator[tuple[int, str, str]]:
    """(column, class, characters) of each run of one colour and one width."""
    column, colour = 0, _CLASSES["0"]
    for part in re.findall(r"\x1b\[\d*m|[\u2e80-\uffff]+|[^\x1b\u2e80-\uffff]+", line):
        if part[0] == "\x1b":
            colour = _CLASSES[part[2:-1]]
        else:
            yield column, colour, part
            column += width_of(part)


def _described(name: str, language: str) -> str:
    """What the picture shows, in the words of the verdict."""
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in seen(name, language)]
    blanks = [i for i, line in enumerate(plain) if not line.strip()]
    return " ".join(line.strip() for line in plain[blanks[-2] + 1 : blanks[-1]])


def svg(name: str, language: str) -> str:
    """The picture of a transcript."""
    shown = seen(name, language)
    width = round(COLUMNS * _CELL + 2 * _MARGIN)
    height = len(shown) * _LINE + 2 * _MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{html.escape(shown[0])}</title>",
        f"<desc>{html.escape(_described(name, language))}</desc>",
        f"<style>{_STYLE}</style>",
        f'<rect class="bg" width="{width}" height="{height}" rx="8"/>',
        f'<g font-family="{_FONTS}" font-size="14" xml:space="preserve">',
    ]
    for row, line in enumerate(shown):
        y = _MARGIN + row * _LINE + 14
        for column, colour, text in _runs(line):
            if text.strip():
                blanks = len(text) - len(text.lstrip())
                x, text = _MARGIN + (column + blanks) * _CELL, text.strip()
                long = width_of(text) * _CELL
                out.append(
                    f'<text x="{x:.1f}" y="{y}" class="{colour}" textLength="{long:.1f}">'
                    f"{html.escape(text)}</text>"
                )
    return "\n".join([*out, "</g>", "</svg>", ""])


def path(name: str, language: str) -> Path:
    """Where a picture lies."""
    return FIGURES / f"doctor-{name}{'.zh' if language == 'zh' else ''}.svg"


if __name__ == "__main__":
    for name in PICTURES:
        for language in ("en", "zh"):
            path(name, language).write_text(svg(name, language), encoding="utf-8")
            print(path(name, language))

"""What `ascend-dmi -c` says: the toolbox's own verdict on each package.

The manual shows its table as pictures alone, so this reads leniently: a row is a line that names a
package, its status one of three words; what is not understood is left out.
"""

from __future__ import annotations

import re

PACKAGES = ("toolkit", "nnrt", "nnae", "tfplugin", "toolbox", "npu-driver", "npu-firmware", "mcu")
_NAME = re.compile(rf"^({'|'.join(PACKAGES)})$", re.IGNORECASE)
_CELLS = re.compile(r"\s*\|\s*|\s{2,}|\t+")
_STATUS = re.compile(r"^(INCOMPATIBLE(?: PACKAGE)?|OK|NA)$", re.IGNORECASE)


def parse_ascend_dmi(text: str) -> dict[str, tuple[str, str]]:
    """Package to (version, status); status is "ok", "incompatible" or "na". Never raises."""
    found: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        cells = [cell for cell in _CELLS.split(line.strip(" \t|")) if cell]
        match = _NAME.match(cells[0]) if len(cells) > 1 else None
        status = next((s[1] for cell in cells[1:] if (s := _STATUS.match(cell))), "")
        if match and status:
            said = status.lower().removesuffix(" package")
            version = "" if _STATUS.match(cells[1]) else cells[1]
            found.setdefault(match[1].lower(), (version, said))
    return found

"""What `npu-smi info` says, in each of its layouts (A2, A3, 310P, 950, and the wide one).

Source: the tool's own format strings, releases 24.1 to 26.0, and captures in public issues.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# https://www.hiascend.com/document: DCMI API reference, "return codes".
DCMI_CODES = {
    -8001: "invalid parameter",
    -8002: "operation not permitted",
    -8003: "out of memory",
    -8005: "inner error",
    -8006: "timeout",
    -8007: "invalid device id",
    -8008: "device does not exist",
    -8009: "ioctl failed",
    -8010: "sending a message failed",
    -8011: "receiving a message failed",
    -8012: "not ready",
    -8013: "not supported in a container",
    -8014: "file operation failed",
    -8015: "reset failed",
    -8016: "aborted",
    -8017: "upgrading",
    -8020: "resource occupied",
    -8022: "partition not right",
    -8255: "not supported",
    -9005: "board type cannot be read",
}


@dataclass(slots=True)
class Card:
    """One chip of the table; what the table leaves open is None."""

    npu: int
    name: str
    health: str
    chip: int = 0
    phy_id: int | None = None
    bus: str = ""
    used_mb: int | None = None
    total_mb: int | None = None


@dataclass(slots=True)
class Smi:
    """The whole output: driver version, chips, processes (npu, pid, name, MB), an error code."""

    version: str = ""
    cards: list[Card] = field(default_factory=list)
    processes: list[tuple[int, int, str, int]] = field(default_factory=list)
    code: int | None = None
    incomplete_driver: bool = False
    no_card: bool = False


def parse_npu_smi(text: str) -> Smi:
    """Read the output of `npu-smi info`; never raises, what is not understood is left out."""
    smi = Smi()
    if match := re.search(r"ret is (-\d{1,6})\b", text):
        smi.code = int(match[1])
    smi.incomplete_driver = "driver package may not be completely installed" in text
    smi.no_card = "There is no NPU card on this server" in text
    if match := re.search(r"npu-smi\s+\S+\s+Version:\s*(\S+)", text):
        smi.version = match[1]
    section, card = "cards", None
    for line in text.splitlines():
        line = line.strip()
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "Process id" in line:
            section = "processes"
        elif "Bus-Id" in line or "Health" in line or "npu-smi" in line or "No running" in line:
            continue
        elif section == "processes":
            _process(smi, cells)
        elif card is None:
            card = _first_line(cells)
        else:
            _second_line(card, cells)
            smi.cards.append(card)
            card = None
    return smi


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None


def _process(smi: Smi, cells: list[str]) -> None:
    ids = [_number(part) for part in cells[0].split()]
    if len(cells) < 4 or not ids or None in ids:
        return
    npu, pid, used = ids[0], _number(cells[1]), _number(cells[3])
    if npu is not None and pid is not None and used is not None:
        smi.processes.append((npu, pid, cells[2], used))


def _first_line(cells: list[str]) -> Card | None:
    if len(cells) == 4:  # 950: id | name | health | ...
        names, health = f"{cells[0]} {cells[1]}", cells[2]
    elif len(cells) == 3:
        names, health = cells[0], cells[1]
    else:
        return None
    parts = names.split()
    npu = _number(parts[0]) if parts else None
    if npu is None or len(parts) < 2:
        return None
    return Card(npu, " ".join(parts[1:]), health)


def _second_line(card: Card, cells: list[str]) -> None:
    names, bus, tail = ["", "", "", *cells][-3:]
    if len(cells) == 4:
        names = f"{cells[0]} {cells[1]}"
    ids = [number for part in names.split() if (number := _number(part)) is not None]
    card.chip = ids[0] if ids else 0
    card.phy_id = ids[1] if len(ids) > 1 else None
    card.bus = "" if bus == "NA" else bus
    pairs = re.findall(r"(\d{1,11})\s*/\s*(\d{1,11})", tail)
    if pairs:  # the last pair is HBM, or the only memory of a 310P
        card.used_mb, card.total_mb = int(pairs[-1][0]), int(pairs[-1][1])


def generation(name: str) -> str:
    """Generation of a chip by the name that npu-smi prints: A1, A2, A3, 310P, 310B, A5 or ""."""
    name = name.removeprefix("Ascend").strip()
    if re.match(r"950", name):
        return "A5"
    if re.match(r"910(_93|C)", name) or name == "910":
        return "A3"
    if re.match(r"910B\d", name):
        return "A2"
    if re.match(r"910(B$|A|Pro[AB]|PremiumA)", name):
        return "A1"
    if re.match(r"310P", name):
        return "310P"
    if re.match(r"310B", name):
        return "310B"
    return ""


# PCI device ids of vendor 0x19e5 that are accelerators; network cards bear the same vendor id.
PCI_GENERATIONS = {"0xd801": "A1", "0xd802": "A2", "0xd803": "A3", "0xd500": "310P", "0xd806": "A5"}

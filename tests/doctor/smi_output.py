"""`npu-smi info` as the released tool prints it for cards with HBM (A2 and A3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WIDE = "+" + "-" * 96 + "+"
_SEP = "+---------------------------+---------------+" + "-" * 52 + "+"
_EQ = _SEP.replace("-", "=")


def cards(count: int = 8, name: str = "910B3", health: str = "OK", used: int = 3400) -> list[Any]:
    return [
        {
            "npu": i, "chip": 0, "phy": i, "name": name, "health": health, "power": 98.8,
            "temp": 35, "bus": f"0000:{0xC1 + i:02X}:00.0", "core": 0, "used": used, "total": 65536,
        }
        for i in range(count)
    ]  # fmt: skip


def render(
    version: str,
    chips: Sequence[dict[str, Any]],
    processes: Sequence[tuple[int, int, int, str, int]] = (),
    *,
    a3: bool = False,
) -> str:
    second = "| Chip  Phy-ID              " if a3 else "| Chip                      "
    out = [
        _WIDE,
        "| npu-smi %-24s Version: %-52s |" % (version, version),  # noqa: UP031
        _SEP,
        "| NPU   Name                | Health        "
        "| Power(W)    Temp(C)           Hugepages-Usage(page)|",
        second + "| Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |",
        _EQ,
    ]
    for i, c in enumerate(chips):
        power = "-" if a3 and c["chip"] == 1 else f"{c['power']:.1f}"
        out.append(
            f"| {c['npu']:<5d} {c['name']:<20s}| {c['health']:<13s} "
            f"| {power:<11s} {c['temp']:<17d} {0:<5d}/ {0:<13d} |"
        )
        left = f"| {c['chip']:<5d} {c['phy']:<20d}| " if a3 else f"| {c['chip']:<26d}| "
        out.append(
            f"{left}{c['bus']:<14s}| {c['core']:<11d} {0:<5d}/ {0:<10d} "
            f"{c['used']:<5d}/ {c['total']:<13d} |"
        )
        last = i + 1 == len(chips) or chips[i + 1]["npu"] != c["npu"]
        out.append(_EQ if last else _WIDE)
    out += [
        _SEP,
        "| NPU     Chip              | Process id    "
        "| Process name             | Process memory(MB)      |",
        _EQ,
    ]
    for npu in sorted({c["npu"] for c in chips}):
        mine = [
            f"| {n:<7d} {chip:<18d}| {pid:<13d} | {name:<24s} | {mb:<23d} |"
            for n, chip, pid, name, mb in processes
            if n == npu
        ]
        out += mine or [f"| No running processes found in NPU {npu:<61d}|"]
        out.append(_EQ)
    return "\n".join(out) + "\n"

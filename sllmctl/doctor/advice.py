"""Which known row of versions is nearest to what is installed, when the parts disagree."""

from __future__ import annotations

from dataclasses import dataclass

from sllmctl.doctor.checks.packages import torch_command
from sllmctl.doctor.checks.vllm import vllm_command
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.versions import cann_base, public

# Checks that speak of parts which do not belong together.
ABOUT_ROWS = {"PY005", "PY006", "NNAL002", "VLLM001", "VLLM002", "CANN003"}


@dataclass(frozen=True, slots=True)
class Row:
    """A combination that was tested together: what of it is here, and commands for the rest."""

    name: str
    parts: tuple[tuple[str, str], ...]
    here: tuple[str, ...]
    commands: tuple[str, ...]


def rows_for(m: Machine, troubled: set[str]) -> tuple[Row, ...]:
    """The nearest tested rows, best first; none unless two parts disagree.

    Args:
        m: The machine.
        troubled: IDs of the checks that failed or warned.
    """
    if not troubled & ABOUT_ROWS or m.cann is None:
        return ()
    installed = {
        "CANN": cann_base(m.cann.version),
        "torch": public(m.dists.version("torch")),
        "torch_npu": public(m.dists.version("torch-npu")),
    }
    if m.nnal:
        installed["NNAL"] = cann_base(m.nnal[0].version)
    engines = bool({"vllm"} & set(m.profiles))
    rows = []
    if engines:
        if m.dists.get("vllm"):
            installed["vllm"] = public(m.dists.version("vllm"))
        if m.dists.get("vllm-ascend"):
            installed["vllm-ascend"] = public(m.dists.version("vllm-ascend"))
        for known in m.tables.vllm_ascend:
            rows.append(
                {
                    "vllm-ascend": known.vllm_ascend[-1],
                    "vllm": known.vllm[-1],
                    "CANN": known.cann,
                    "NNAL": known.cann,
                    "torch": known.torch,
                    "torch_npu": public(known.torch_npu),
                }
            )
    else:
        for pair in m.tables.torch_npu:
            rows.append({"CANN": pair.cann, "torch": pair.torch, "torch_npu": pair.torch_npu})
            if m.nnal:
                rows[-1]["NNAL"] = pair.cann
    scored = sorted(((_score(row, installed), -i, row) for i, row in enumerate(rows)), reverse=True)
    if any(score == len(row) for score, _, row in scored):
        return ()
    chosen = [row for score, _, row in scored if score == scored[0][0] and score > 0][:2]
    # A row that keeps CANN as it is costs least: always show one beside the nearest.
    kept = [row for score, _, row in scored if row["CANN"] == installed["CANN"] and score > 0][:1]
    for row in kept:
        if row not in chosen:
            chosen = [*chosen[:1], row]
    return tuple(_row(row, installed, m.arch) for row in chosen)


def _score(row: dict[str, str], installed: dict[str, str]) -> int:
    return sum(installed.get(part) == version for part, version in row.items())


def _row(row: dict[str, str], installed: dict[str, str], arch: str) -> Row:
    here = tuple(part for part, version in row.items() if installed.get(part) == version)
    rest = {part: version for part, version in row.items() if part not in here}
    commands = []
    if "CANN" in rest:
        commands.append(f"./Ascend-cann-toolkit_{rest['CANN']}_linux-{arch}.run --install")
    if "NNAL" in rest:
        commands.append(f"./Ascend-cann-nnal_{rest['NNAL']}_linux-{arch}.run --install")
    if "torch" in rest:
        commands.append(torch_command(rest["torch"], row["torch_npu"], arch))
    elif "torch_npu" in rest:
        commands.append(f"pip install torch_npu=={rest['torch_npu']}")
    if "vllm" in rest:
        commands.append(vllm_command(rest["vllm"]))
    if "vllm-ascend" in rest:
        commands.append(f"pip install vllm-ascend=={rest['vllm-ascend']}")
    name = f"vllm-ascend {row['vllm-ascend']}" if "vllm-ascend" in row else f"torch {row['torch']}"
    return Row(name, tuple(row.items()), here, tuple(commands))

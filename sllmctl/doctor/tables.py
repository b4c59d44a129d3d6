"""The dated tables of what fits together: data, with a source for each, in `tables.json`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sllmctl.doctor.versions import (
    Key,
    cann_base,
    cann_key,
    driver_key,
    public,
    release,
    starts_with,
)
from sllmctl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TorchNpuRow:
    """One release of torch_npu and what it was released for."""

    torch_npu: str
    torch: str
    cann: str


@dataclass(frozen=True, slots=True)
class VllmRow:
    """One release of vllm-ascend and what it was tested with; ``python`` is (from, below)."""

    vllm_ascend: tuple[str, ...]
    vllm: tuple[str, ...]
    python: tuple[tuple[int, ...], tuple[int, ...]]
    cann: str
    torch: str
    torch_npu: str


@dataclass(frozen=True, slots=True)
class DriverRow:
    """What one CANN accepts; versions are prefixes: 25.5 stands for 25.5.0, 25.5.1 ..."""

    cann: tuple[str, ...]
    paired: tuple[str, ...]
    accepted: tuple[str, ...]
    rejected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """A line of an error log, and the checks that look for its cause."""

    id: str
    pattern: str
    checks: tuple[str, ...]
    cause: str


class Tables:
    """All tables, and the questions that checks ask them."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.date: str = document["date"]
        self.torch_npu = [TorchNpuRow(*row) for row in document["torch_npu"]["rows"]]
        self.newest_cann: Key = max(filter(None, (cann_key(r.cann) for r in self.torch_npu)))
        self.vllm_ascend = [_vllm_row(row) for row in document["vllm_ascend"]["rows"]]
        self.driver = [
            DriverRow(*(tuple(cell.split()) for cell in row)) for row in document["driver"]["rows"]
        ]
        self.torchvision: dict[str, str] = document["torchvision"]["rows"]
        self.python: dict[str, list[str]] = document["python"]["rows"]
        self.cann_python: list[str] = document["cann_python"]["rows"]
        self.cann_python_more: list[str] = document["cann_python_more"]["rows"]
        self.triton_ascend: list[list[str]] = document["triton_ascend"]["rows"]
        self.sgl_kernel_head: dict[str, str] = document["sgl_kernel_npu"]["rows"][0]
        self.sglang: list[dict[str, str]] = document["sglang"]["rows"]
        self.signatures = [
            Signature(i, pattern, tuple(checks.split()), cause)
            for i, pattern, checks, cause in document["signatures"]["rows"]
        ]

    def for_torch_npu(self, version: str) -> TorchNpuRow | None:
        """The row of a torch_npu release, or None if the table does not know it."""
        return next((r for r in self.torch_npu if r.torch_npu == public(version)), None)

    def torch_npu_for(self, torch: str, cann: str) -> TorchNpuRow | None:
        """The release of torch_npu for a torch and a CANN, or None."""
        for row in self.torch_npu:
            if row.torch == public(torch) and row.cann == cann_base(cann):
                return row
        return None

    def for_vllm_ascend(self, version: str) -> VllmRow | None:
        """The row of a vllm-ascend release, or None."""
        return next((r for r in self.vllm_ascend if public(version) in r.vllm_ascend), None)

    def triton_ascend_for(self, vllm_ascend: str) -> str:
        """The release of triton-ascend for a vllm-ascend, or "" where the table does not say."""
        here = release(vllm_ascend)
        for first, last, version in self.triton_ascend:
            if here and release(first)[:3] <= here[:3] <= release(last)[:3]:
                return version
        return ""

    def may_know(self, cann: str) -> bool:
        """Whether a CANN is of the time of the tables: none to come, and no internal one."""
        key = cann_key(cann)
        return key is not None and key <= self.newest_cann

    def for_cann_driver(self, cann: str) -> DriverRow | None:
        """What a CANN accepts as its driver, or None."""
        return next((r for r in self.driver if cann_base(cann) in r.cann), None)

    def python_for(self, torch: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """First and last Python minor of a torch release's wheels, or None."""
        key = ".".join(map(str, release(torch)[:2]))
        found = self.python.get(key)
        return None if found is None else (release(found[0]), release(found[1]))


def load_tables(path: Path | None = None) -> Tables:
    """The tables of this release, or those of a file.

    Raises:
        ConfigError: The file cannot be read, or is none.
    """
    if path is None:
        source = resources.files("sllmctl.doctor") / "tables.json"
        return Tables(json.loads(source.read_text(encoding="utf-8")))
    try:
        tables = Tables(json.loads(path.read_text(encoding="utf-8")))
        for signature in tables.signatures:
            re.compile(signature.pattern)
        return tables
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, re.error
    ) as exc:  # fmt: skip
        raise ConfigError(
            f"`{path}` holds no tables: {exc}", hint="start from sllmctl/doctor/tables.json"
        ) from exc


def driver_verdict(row: DriverRow, driver: str) -> str:
    """How a driver suits a CANN: paired, accepted, newer, old, rejected or unknown."""
    key = driver_key(driver)
    if key is None:
        return "unknown"
    if any(starts_with(driver, prefix) for prefix in row.paired):
        return "paired"
    if any(starts_with(driver, prefix) for prefix in row.accepted):
        return "accepted"
    for prefix in row.rejected:
        if starts_with(driver, prefix) or key[:2] < release(prefix)[:2]:
            return "rejected"
    known = [k for prefix in (*row.paired, *row.accepted) if (k := _prefix_key(prefix))]
    return "newer" if key >= max(known) else "old" if key < min(known) else "accepted"


def _prefix_key(prefix: str) -> tuple[int, ...] | None:
    return driver_key(prefix) or release(prefix) or None


def _vllm_row(row: list[str]) -> VllmRow:
    ascend, vllm, low, high, cann, torch, torch_npu = row
    return VllmRow(
        tuple(ascend.split()),
        tuple(vllm.split()),
        (release(low), release(high)),
        cann,
        torch,
        torch_npu,
    )

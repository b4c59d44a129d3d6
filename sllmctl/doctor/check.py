"""What a check is, what it finds, and the registry of all checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from sllmctl.doctor.text import Text, say

if TYPE_CHECKING:
    from sllmctl.doctor.machine import Machine

PROFILES = ("base", "convert", "store", "vllm", "sglang", "build")
GROUPS = {
    "DRV": "Driver and cards",
    "CANN": "CANN",
    "NNAL": "NNAL / ATB",
    "ENV": "Environment",
    "PY": "Python packages",
    "SVC": "Store of sllmctl",
    "STORE": "sllm-store",
    "VLLM": "vLLM",
    "SGL": "SGLang",
    "NET": "Network and proxies",
    "HUB": "Model hubs",
    "MEM": "Memory",
    "IO": "Disk",
    "CTR": "Container",
    "SRV": "Server",
    "DEEP": "Device",
}


class Status(str, Enum):
    """How a check ended, best first."""

    PASS = "pass"
    SKIP = "skip"
    INFO = "info"
    WARN = "warn"
    FAIL = "fail"
    ERROR = "error"

    @property
    def rank(self) -> int:
        """0 for a pass, more for worse."""
        return list(Status).index(self)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Something that was looked at: kind is file, env, cmd, dist, limit or net."""

    kind: str
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: one sentence, what it rests on, and one remedy.

    Attributes:
        fix: A command to copy, or "".
        advice: The remedy in words, where no command is one.
        action: Name of the action of `--fix` that mends it, or "".
        more: Further findings of the same check, each a sentence.
    """

    status: Status
    summary: Text
    evidence: tuple[Evidence, ...] = ()
    fix: str = ""
    advice: Text | None = None
    action: str = ""
    more: tuple[Text, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at. IDs are permanent: one that is retired is never used again.

    Attributes:
        severity: The worst status that it can report.
        level: 0 reads files, 1 runs commands or connects to loopback, 2 touches a device.
        profiles: The profiles that it belongs to.
        needs: Checks that must not have failed for this one to mean anything.
        network: Whether it leaves this machine (only with `--net`).
    """

    id: str
    title: str
    why: str
    looks_at: str
    severity: Status
    level: int
    profiles: tuple[str, ...]
    needs: tuple[str, ...]
    network: bool
    run: Callable[[Machine], Finding]

    @property
    def group(self) -> str:
        """The letters of the ID, a key of `GROUPS`."""
        return self.id.rstrip("0123456789")


CHECKS: dict[str, Check] = {}


def check(
    id: str,  # noqa: A002
    *,
    title: str,
    why: str,
    looks_at: str,
    severity: Status = Status.FAIL,
    level: int = 0,
    profiles: str = "base",
    needs: tuple[str, ...] = (),
    network: bool = False,
) -> Callable[[Callable[[Machine], Finding]], Callable[[Machine], Finding]]:
    """Register a function as a check; ``profiles`` are words."""

    def register(run: Callable[[Machine], Finding]) -> Callable[[Machine], Finding]:
        if id in CHECKS:
            raise ValueError(f"{id} is registered twice")
        CHECKS[id] = Check(
            id, title, why, looks_at, severity, level, tuple(profiles.split()), needs, network, run
        )
        return run

    return register


def _maker(status: Status) -> Callable[..., Finding]:
    def make(
        summary: Text,
        *evidence: Evidence,
        fix: str = "",
        advice: Text | None = None,
        action: str = "",
    ) -> Finding:
        return Finding(status, summary, evidence, fix, advice, action)

    return make


ok = _maker(Status.PASS)
info = _maker(Status.INFO)
warn = _maker(Status.WARN)
fail = _maker(Status.FAIL)
skip = _maker(Status.SKIP)


def worst(findings: Iterable[Finding | None], otherwise: Finding) -> Finding:
    """Several findings of one check as one: the worst leads, the others follow as sentences."""
    found = sorted((f for f in findings if f is not None), key=lambda f: -f.status.rank)
    if not found:
        return otherwise
    lead, *rest = found
    seen = {lead.summary}
    more = [f.summary for f in rest if not (f.summary in seen or seen.add(f.summary))]  # type: ignore[func-returns-value]
    evidence = tuple(dict.fromkeys(item for f in found for item in f.evidence))
    return replace(lead, evidence=evidence, more=tuple(more))


def file(path: str, value: object = "") -> Evidence:
    """A file that was read, and what it said."""
    return Evidence("file", path, str(value))


def env(name: str, value: object) -> Evidence:
    """An environment variable."""
    return Evidence("env", name, str(value))


def cmd(command: str, value: object) -> Evidence:
    """A command that was run, and what it said."""
    return Evidence("cmd", command, str(value))


def dist(name: str, version: object) -> Evidence:
    """An installed distribution."""
    return Evidence("dist", name, str(version))


def limit(name: str, value: object) -> Evidence:
    """A limit or size of the machine."""
    return Evidence("limit", name, str(value))


__all__ = [
    "CHECKS",
    "Check",
    "Evidence",
    "Finding",
    "Status",
    "check",
    "cmd",
    "dist",
    "env",
    "fail",
    "file",
    "info",
    "limit",
    "ok",
    "say",
    "skip",
    "warn",
    "worst",
]

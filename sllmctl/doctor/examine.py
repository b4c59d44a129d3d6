"""Running the checks: which ones, in which order, and what comes out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import sllmctl.doctor.all_checks  # noqa: F401  (registers them)
from sllmctl.doctor.advice import Row, rows_for
from sllmctl.doctor.check import CHECKS, PROFILES, Check, Finding, Status, say, skip
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.text import Text

NEEDS = say("needs {id}", id="").template
LEFT_OUT = say("not in --only")
_BLOCKING = {Status.FAIL, Status.ERROR, Status.SKIP}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A check and what it found; ``selected`` is False for one that was not asked for."""

    check: Check
    finding: Finding
    selected: bool
    duration_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Examination:
    """All checks of one machine, in their order."""

    machine: Machine
    outcomes: tuple[Outcome, ...]
    rows: tuple[Row, ...] = ()
    duration_ms: float = 0.0
    counts: Counter[Status] = field(default_factory=Counter)

    def of(self, status: Status) -> list[Outcome]:
        """The outcomes that ended so, in order."""
        return [o for o in self.outcomes if o.finding.status is status]

    def exit_code(self, *, strict: bool = False) -> int:
        """0 nothing failed, 3 findings, 70 a check broke."""
        if self.counts[Status.FAIL] or (strict and self.counts[Status.WARN]):
            return 3
        return 70 if self.counts[Status.ERROR] else 0


def matching(pattern: str) -> list[str]:
    """The IDs that a pattern of the command line names: an ID or the beginning of one."""
    wanted = pattern.strip().upper()
    return [id for id in CHECKS if wanted and id.startswith(wanted)]  # noqa: A001


def examine(
    machine: Machine, *, only: Sequence[str] = (), without: Sequence[str] = ()
) -> Examination:
    """Run the checks of the machine's profiles.

    Args:
        machine: What to look at.
        only: IDs to run instead, whatever their profile.
        without: IDs to leave out.
    """
    started = time.monotonic()
    run = _Run(machine, frozenset(only), frozenset(without))
    outcomes = tuple(run.outcome(id) for id in CHECKS)  # noqa: A001
    troubled = {o.check.id for o in outcomes if o.finding.status in (Status.WARN, Status.FAIL)}
    return Examination(
        machine,
        outcomes,
        rows_for(machine, troubled),
        (time.monotonic() - started) * 1e3,
        Counter(o.finding.status for o in outcomes),
    )


class _Run:
    """One examination: each check runs once, a dependency also where it is not shown."""

    def __init__(self, machine: Machine, only: frozenset[str], without: frozenset[str]) -> None:
        self._machine = machine
        self._only = only
        self._without = without
        self._found: dict[str, tuple[Finding, float]] = {}

    def outcome(self, id: str) -> Outcome:  # noqa: A002
        reason = self._left_out(CHECKS[id])
        if reason is not None:
            return Outcome(CHECKS[id], reason, selected=False)
        finding, duration_ms = self._find(id)
        return Outcome(CHECKS[id], finding, selected=True, duration_ms=duration_ms)

    def _left_out(self, check: Check) -> Finding | None:
        if check.id in self._without:
            return skip(say("left out by --skip"))
        if self._only:
            return None if check.id in self._only else skip(LEFT_OUT)
        if not set(check.profiles) & set(self._machine.profiles):
            return skip(
                say("not part of the profile {name}", name=", ".join(self._machine.profiles))
            )
        return None

    def _find(self, id: str) -> tuple[Finding, float]:  # noqa: A002
        if id not in self._found:
            started = time.monotonic()
            finding = self._look(CHECKS[id])
            self._found[id] = finding, (time.monotonic() - started) * 1e3
        return self._found[id]

    def _look(self, check: Check) -> Finding:
        options = self._machine.options
        if check.level == 1 and not options.commands:
            return skip(say("needs commands, which --no-exec forbids"))
        if check.level == 2 and not options.deep:
            return skip(say("touches devices: only with --deep"))
        if check.network and not options.network:
            return skip(say("leaves this machine: only with --net"))
        for needed in check.needs:
            if self._find(needed)[0].status in _BLOCKING:
                return skip(Text(NEEDS, (("id", needed),)))
        try:
            return check.run(self._machine)
        except Exception as exc:  # a broken check must not hide the others
            return Finding(
                Status.ERROR,
                say("the check itself failed: {error}", error=f"{type(exc).__name__}: {exc}"),
                advice=say("this is a bug: please report it with `sllmctl doctor --report FILE`"),
            )


assert all(p in PROFILES for c in CHECKS.values() for p in c.profiles)

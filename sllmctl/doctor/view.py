"""The examination as a person reads it: what is wrong, why, what to do, and what to do first."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from sllmctl.doctor.advice import ABOUT_ROWS, Row
from sllmctl.doctor.check import CHECKS, GROUPS, Check, Status
from sllmctl.doctor.examine import LEFT_OUT, NEEDS, Examination, Outcome
from sllmctl.doctor.layout import coloured, dim, pad, together, width_of, wrap
from sllmctl.doctor.log_signatures import Match
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.redact import Hide
from sllmctl.doctor.text import Text, say, translate

MARKS = {
    Status.PASS: ("✓", "[OK]"),
    Status.INFO: ("·", "[..]"),
    Status.WARN: ("!", "[!!]"),
    Status.FAIL: ("✗", "[XX]"),
    Status.ERROR: ("✗", "[XX]"),
    Status.SKIP: ("-", "[--]"),
}
_INDENT = 15
_EVIDENCE = 4
_NAMED = 3


@dataclass(frozen=True, slots=True)
class View:
    """How to write.

    Attributes:
        language: A key of `LANGUAGES`.
        unicode: Whether marks may be Unicode.
        hide: Takes secrets out.
        verbose: Whether what passed is shown, too.
        columns: Width of the terminal; 0 breaks no line.
        colour: Whether marks have colours, which say what the marks say.
    """

    language: str
    unicode: bool
    hide: Hide
    verbose: bool = False
    columns: int = 0
    colour: bool = False

    def say(self, text: Text | str) -> str:
        """A sentence in the language of the view, without secrets."""
        if isinstance(text, str):
            return translate(text, self.language)
        return self.hide(text.render(self.language))

    def mark(self, status: Status) -> str:
        """The sign of a status."""
        sign = MARKS[status][0 if self.unicode else 1]
        return coloured(sign, status) if self.colour else sign

    def marked(self, status: Status, lead: str, text: str, indent: int = 0) -> list[str]:
        """A sign, what leads the text, and the text, broken where it must be."""
        sign = MARKS[status][0 if self.unicode else 1]
        first, *rest = wrap(f"{' ' * indent}{sign} {lead}", text, self.columns)
        return [first.replace(sign, self.mark(status), 1), *rest]

    def wrapped(self, lead: str, text: str) -> list[str]:
        """A text behind its lead, broken where it must be."""
        return wrap(lead, text, self.columns)

    def quiet(self, lines: list[str]) -> list[str]:
        """Lines that may stand back."""
        return [dim(line) for line in lines] if self.colour else lines


def lines(done: Examination, view: View) -> list[str]:
    """The whole examination."""
    out = [*_heading(done.machine, view), ""]
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in done.outcomes:
        if outcome.selected:
            groups[outcome.check.group].append(outcome)
    shown = {group: members for group, members in groups.items() if _worth_showing(members, view)}
    width = max((width_of(view.say(GROUPS[group])) for group in shown), default=0)
    for group, members in shown.items():
        out += _group(view.say(GROUPS[group]), width, members, view)
    out += [*_rows(done.rows, view), "", *_verdict(done, view), "", *_counts(done, view)]
    return out


def _worth_showing(members: list[Outcome], view: View) -> bool:
    return view.verbose or any(o.finding.status is not Status.SKIP for o in members)


def _heading(m: Machine, view: View) -> list[str]:
    parts = [m.arch]
    if m.smi.cards:
        names = Counter(card.name for card in m.smi.cards)
        parts += [f"{count} x {name}" for name, count in names.items()]
    elif m.pci:
        kinds = Counter(kind for _, kind in m.pci)
        parts += [f"{count} x Ascend {kind}" for kind, count in kinds.items()]
    if m.driver:
        parts.append(view.say(say("driver {version}", version=m.driver)))
    if m.cann:
        parts.append(f"CANN {m.cann.version}")
    if m.nnal:
        parts.append(f"NNAL {m.nnal[0].version}")
    parts.append(f"Python {m.probe.host.python}")
    for name in ("torch", "torch-npu", "vllm-ascend", "sglang"):
        if version := m.dists.version(name):
            parts.append(f"{name.replace('-', '_') if name == 'torch-npu' else name} {version}")
    return view.wrapped("", ", ".join(together(view.hide(part)) for part in parts))


def _group(name: str, width: int, members: list[Outcome], view: View) -> list[str]:
    counts = Counter(o.finding.status for o in members)
    worst = max((o.finding.status for o in members), key=lambda s: s.rank)
    lead = Status.PASS if worst in (Status.INFO, Status.SKIP) and counts[Status.PASS] else worst
    out = view.marked(lead, f"{pad(name, width)}  ", _tally(counts, view))
    for outcome in members:
        status = outcome.finding.status
        if status in (Status.PASS, Status.SKIP) and not view.verbose:
            continue
        out += _problem(outcome, view)
    return out


def _tally(counts: Counter[Status], view: View) -> str:
    words = [
        (Status.ERROR, say("{count} broken", count=counts[Status.ERROR])),
        (Status.FAIL, say("{count} failed", count=counts[Status.FAIL])),
        (Status.WARN, say("{count} to look at", count=counts[Status.WARN])),
        (Status.PASS, say("{count} passed", count=counts[Status.PASS])),
        (Status.INFO, say("{count} noted", count=counts[Status.INFO])),
        (Status.SKIP, say("{count} not checked", count=counts[Status.SKIP])),
    ]
    comma = view.say(", ")
    return comma.join(view.say(text) for status, text in words if counts[status])


def _problem(outcome: Outcome, view: View) -> list[str]:
    check, finding = outcome.check, outcome.finding
    out = view.marked(finding.status, f"{check.id:<8} ", view.say(finding.summary), indent=4)
    if finding.status in (Status.PASS, Status.SKIP):
        return out
    indent = " " * _INDENT
    for text in finding.more:
        out += view.wrapped(indent, view.say(text))
    if finding.status is Status.INFO:
        return out
    why, fix, see = view.say("why:"), view.say("fix:"), view.say("seen:")
    width = max(width_of(label) for label in (why, fix, see))
    out += view.quiet(view.wrapped(f"{indent}{pad(why, width)} ", view.say(check.why)))
    for item in finding.evidence if view.verbose else finding.evidence[:_EVIDENCE]:
        # A path or a value is copied whole: it is not broken.
        value = f": {item.value}" if item.value else ""
        line = f"{indent}{pad(see, width)} {view.hide(item.name + value)}"
        out += view.quiet([line])
    if finding.fix:
        out.append(f"{indent}{pad(fix, width)} {view.hide(finding.fix)}")
    if finding.advice:
        lead = pad("" if finding.fix else fix, width)
        out += view.wrapped(f"{indent}{lead} ", view.say(finding.advice))
    if finding.action:
        out.append(f"{indent}{' ' * width} sllmctl doctor --fix --only {check.id}")
    return out


def _rows(rows: tuple[Row, ...], view: View) -> list[str]:
    if not rows:
        return []
    out = ["", view.say("These parts were never released together. Choose one row:")]
    if len(rows) == 1:
        out[1] = view.say("These parts were never released together. The nearest row is:")
    for row in rows:
        parts = ", ".join(together(f"{part} {version}") for part, version in row.parts)
        out += view.wrapped("  - ", parts)
        here = view.say(say("already here: {parts}", parts=", ".join(row.here) or "-"))
        out += view.wrapped("    ", here)
        out += [f"    $ {command}" for command in row.commands]
    return out


def _verdict(done: Examination, view: View) -> list[str]:
    m = done.machine
    failed = [*done.of(Status.ERROR), *done.of(Status.FAIL)]
    warned = done.of(Status.WARN)
    purpose = ", ".join(m.profiles)
    if not failed and not warned:
        if not done.counts[Status.PASS] + done.counts[Status.INFO]:
            return [view.say("Nothing was checked.")]
        if any(o.finding.summary == LEFT_OUT for o in done.outcomes):
            return [view.say("What was checked is in order.")]
        if m.profiles == ("convert",) and not m.has_ascend:
            return view.wrapped(
                "",
                view.say(
                    "No Ascend card or software is here: this machine cannot serve models on NPU. "
                    "It can download, convert and verify checkpoints, and load them to the CPU."
                ),
            )
        return view.wrapped(
            "", view.say(say("This machine is ready ({purpose}).", purpose=purpose))
        )
    first = (failed or warned)[0]
    if failed:
        text = (
            say("One thing is broken: {what}.", what=first.finding.summary)
            if len(failed) == 1
            else say("{count} things are broken; the first: {what}.", count=len(failed),
                     what=first.finding.summary)
        )  # fmt: skip
    else:
        text = say("This machine is usable ({purpose}), but look at this: {what}.",
                   purpose=purpose, what=first.finding.summary)  # fmt: skip
    out = view.wrapped("", view.say(text))
    if done.rows and first.check.id in ABOUT_ROWS:
        out += view.wrapped(
            "", view.say("Settle on a row first, as above: each fix alone may break another.")
        )
    elif first.finding.fix:
        out += [view.say("Do this first:"), f"  {view.hide(first.finding.fix)}"]
    elif first.finding.advice:
        out.append(view.say("Do this first:"))
        out += view.wrapped("  ", view.say(first.finding.advice))
    out.append(view.say(say("More about it: sllmctl doctor --explain {id}", id=first.check.id)))
    return out


def _counts(done: Examination, view: View) -> list[str]:
    """How many ended how, and why the rest was not looked at."""
    out = [_tally(done.counts, view)]
    reasons: dict[str, list[str]] = defaultdict(list)
    for outcome in done.of(Status.SKIP):
        reasons[view.say(_reason(outcome, done))].append(outcome.check.id)
    for reason, ids in reasons.items():
        one_group = len({CHECKS[id].group for id in ids}) == 1  # noqa: A001
        known = list(CHECKS)
        in_a_row = known.index(ids[-1]) - known.index(ids[0]) == len(ids) - 1
        names = (
            f"{ids[0]} ... {ids[-1]}" if len(ids) > _NAMED and one_group and in_a_row
            else " ".join(ids) if len(ids) <= _NAMED or one_group
            else view.say(say("{count} checks", count=len(ids)))
        )  # fmt: skip
        out += view.quiet(view.wrapped(f"  {names}{view.say(': ')}", reason))
    return out


def _reason(outcome: Outcome, done: Examination) -> Text:
    """Why a check was left out; where another was that it needs, why that one was."""
    reasons = {o.check.id: o.finding.summary for o in done.of(Status.SKIP)}
    found, seen = outcome.finding.summary, {outcome.check.id}
    while found.template == NEEDS and (needed := str(dict(found.values)["id"])) in reasons:
        if needed in seen:
            break
        seen.add(needed)
        found = reasons[needed]
    return found


def log_lines(matches: list[Match], done: Examination | None, view: View) -> list[str]:
    """What an error log says, and how the checks behind it stand on this machine."""
    if not matches:
        return [view.say("No line of this log is known.")]
    out = []
    for match in matches:
        times = view.say(say("{count} times", count=match.count)) if match.count > 1 else ""
        out += view.marked(Status.FAIL, "", view.say(match.cause))
        place = view.say(say("line {number}", number=match.line_number))
        shown = match.line if len(match.line) <= 160 else match.line[:157] + "..."
        out.append(f"    {', '.join(filter(None, [place, times]))}: {view.hide(shown)}")
        for name in match.checks:
            out.append(f"    sllmctl doctor --explain {name}")
    if done is not None:
        out += ["", view.say("On this machine:")]
        for outcome in done.outcomes:
            if outcome.selected:
                out += _problem(outcome, view)
    return out


def explain(check: Check, view: View) -> list[str]:
    """Everything that is known of one check."""
    labels = [
        (view.say("why:"), view.say(check.why)),
        (view.say("looks at:"), view.say(check.looks_at)),
        (view.say("at worst:"), view.say(check.severity.value)),
        (view.say("profiles:"), ", ".join(check.profiles)),
        (view.say("needs:"), ", ".join(check.needs) or "-"),
        (view.say("touches:"), view.say(TOUCHES[check.level])),
    ]
    width = max(width_of(label) for label, _ in labels)
    out = [*view.wrapped(f"{check.id}  ", view.say(check.title)), ""]
    for label, text in labels:
        out += view.wrapped(f"  {pad(label, width)} ", text)
    return out


TOUCHES = {
    0: "files and the environment",
    1: "commands, or ports of this machine",
    2: "devices, in a child process",
}


def listing(view: View) -> list[str]:
    """All checks, one a line."""
    out = []
    group = ""
    for check in CHECKS.values():
        if check.group != group:
            group = check.group
            out += ["", view.say(GROUPS[group])]
        out += view.wrapped(f"  {check.id:<8} ", view.say(check.title))
    return out[1:]

"""Every sentence that the doctor says, found in its source, its checks and its tables."""

from __future__ import annotations

import ast
from pathlib import Path

import sllmctl
from sllmctl.doctor.check import CHECKS, GROUPS, Status
from sllmctl.doctor.tables import load_tables
from sllmctl.doctor.view import TOUCHES

PACKAGE = Path(sllmctl.__file__).parent


def said_in_source() -> set[str]:
    """First arguments of `say(...)`, where they are literals."""
    found = set()
    places = [*(PACKAGE / "doctor").rglob("*.py"), PACKAGE / "commands" / "doctor_run.py"]
    for path in places:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else (
                node.func.id if isinstance(node.func, ast.Name) else ""
            )  # fmt: skip
            first = node.args[0]
            if name == "say" and isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
    return found


def all_templates() -> set[str]:
    texts = said_in_source() | set(GROUPS.values()) | set(TOUCHES.values())
    for check in CHECKS.values():
        texts |= {check.title, check.why, check.looks_at, check.severity.value}
    texts |= {signature.cause for signature in load_tables().signatures}
    return texts - {Status.ERROR.value}

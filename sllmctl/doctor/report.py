"""The examination as text for a bug report, and two examinations side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sllmctl.doctor.document import SCHEMA
from sllmctl.errors import ConfigError


def markdown(document: dict[str, Any]) -> str:
    """A document of `sllmctl.doctor/1`, which is redacted already, as text to paste."""
    facts, host = document["facts"], document["host"]
    out = [
        f"### sllmctl doctor {document['tool_version']} (tables of {document['table_date']})",
        "",
        f"- machine: {host['arch']}, kernel {host['kernel']}, glibc {host['glibc']}, "
        f"Python {host['python']}{', in a container' if host['container'] else ''}",
        f"- profile: {', '.join(document['profile'])}",
        f"- driver: {facts['driver'] or '-'}",
        *(f"- CANN: {c['version']} ({c['source']})" for c in facts["cann"]),
        *(f"- NNAL: {n['version']} ({n['path']})" for n in facts["nnal"]),
        *(f"- NPU {c['npu']}: {c['name']}, {c['health']}" for c in facts["chips"]),
        "- packages: " + (", ".join(f"{k} {v}" for k, v in facts["packages"].items()) or "-"),
        "",
        "| check | status | finding |",
        "|---|---|---|",
    ]
    for check in document["checks"]:
        if check["status"] in ("pass", "skip"):
            continue
        said = "; ".join([check["summary"], *check["detail"]]).replace("|", "\\|")
        out.append(f"| {check['id']} | {check['status']} | {said} |")
        out += [
            f"| | seen | `{e['name']}`: {e['value']} |".replace("\n", " ")
            for e in check["evidence"]
        ]
    counts = ", ".join(
        f"{count} {status}" for status, count in document["summary"].items() if count
    )
    skipped = [check["id"] for check in document["checks"] if check["status"] == "skip"]
    out += ["", f"{counts}; not checked: {' '.join(skipped) or '-'}", "", "```"]
    out += [f"{e['name']}={e['value']}" for e in facts["environment"]]
    return "\n".join([*out, "```", ""])


def read_document(path: Path) -> dict[str, Any]:
    """A document that `sllmctl doctor --json` wrote.

    Raises:
        ConfigError: The file cannot be read or is none.
    """
    hint = "write one there with `sllmctl doctor --json > FILE`"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"`{path}` cannot be read as JSON: {exc}", hint=hint) from exc
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ConfigError(f"`{path}` is not {SCHEMA}, but {schema or 'something else'}", hint=hint)
    try:
        _flat(document)
    except (AttributeError, KeyError, TypeError) as exc:
        raise ConfigError(f"`{path}` is {SCHEMA}, but damaged", hint=hint) from exc
    return dict(document)


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, here, there) for everything in which two machines differ; "" where one has none."""
    left, right = _flat(here), _flat(there)
    return [
        (key, left.get(key, ""), right.get(key, ""))
        for key in dict.fromkeys([*left, *right])
        if left.get(key, "") != right.get(key, "")
    ]


def _flat(document: dict[str, Any]) -> dict[str, str]:
    facts = document.get("facts", {})
    flat = {key: str(value) for key, value in document.get("host", {}).items()}
    flat["driver"] = str(facts.get("driver", ""))
    flat["CANN"] = ", ".join(str(c.get("version")) for c in facts.get("cann", []))
    flat["NNAL"] = ", ".join(str(n.get("version")) for n in facts.get("nnal", []))
    flat["chips"] = ", ".join(str(c.get("name")) for c in facts.get("chips", []))
    flat |= {name: str(version) for name, version in facts.get("packages", {}).items()}
    flat |= {f"${e['name']}": str(e["value"]) for e in facts.get("environment", [])}
    for check in document.get("checks", []):
        flat[str(check["id"])] = str(check["status"])
    return flat

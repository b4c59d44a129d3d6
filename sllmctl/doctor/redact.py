"""Taking secrets, names and addresses out of what leaves the machine."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sllmctl.doctor.host import Host

_NAMES = (
    r"token|secret|passw|pwd|api[_-]?key|access[_-]?key|private[_-]?key|credential|cookie"
    r"|authorization"
)
_VALUE = r"(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s&;,'\"]+)"
SECRET_NAME = re.compile(rf"{_NAMES}|auth", re.IGNORECASE)
_SECRETS: list[tuple[re.Pattern[str], str]] = [
    # A URL's user and password; all up to the last @, since passwords hold what they like.
    (re.compile(r"://\S{0,1024}@"), "://***@"),
    (re.compile(r"(?<![\w/@.])[\w.%+-]{1,64}:\S{1,128}@(?=[\w.-]+)"), "***@"),
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|npm_|pypi-|xox[abprs]-)[\w-]{6,}"), "***"),
    (re.compile(r"\b(?:sk|ms|dop_v1|rk|pk)-[A-Za-z0-9_-]{8,}"), "***"),
    (re.compile(r"\b(?:AKIA|ASIA|LTAI|AIza)[\w-]{12,}"), "***"),
    (re.compile(r"\beyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*)?"), "***"),
    # A header's value has words, and quotes: all that follows it.
    (re.compile(r"((?:authorization|cookie)['\"]?\s{0,8}[=:]\s{0,8})\S.*", re.I), r"\1***"),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.I), r"\1 ***"),
    (re.compile(r"([?&](?:sig|[\w-]{0,64}signature)=)[^\s&]+", re.I), r"\1***"),
    # NAME=value and "name": value, then --name value.
    (
        re.compile(rf"((?:{_NAMES})[\w-]{{0,64}}['\"]?\s{{0,8}}[=:]\s{{0,8}}){_VALUE}", re.I),
        r"\1***",
    ),
    (
        re.compile(
            rf"(--[\w-]{{0,64}}(?:{_NAMES})(?:or)?[ds]?(?:-[\w-]{{0,64}})?\s{{1,8}}){_VALUE}", re.I
        ),
        r"\1***",
    ),
]
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_DEVICE_IDS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"(Serial Number\s*:\s*)\S+", re.IGNORECASE), r"\1<id>"),
    (re.compile(r"([VN]Die ID\s*:\s*)[0-9A-Fa-f ]+", re.IGNORECASE), r"\1<id>"),
    (re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}(?![\w:])"), "<id>"),
]
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{0,45}:[0-9A-Fa-f:.]{0,45}:[0-9A-Fa-f.]{0,45}(?![\w:])")


def hide_secrets(text: str) -> str:
    """The text without tokens, passwords and what else opens doors, on one line.

    Control characters go too: what a file says must not steer a terminal.
    """
    text = _CONTROLS.sub(" ", text)
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


@dataclass(frozen=True, slots=True)
class Redactor:
    """Hides secrets, and who and where the machine is."""

    host: Host

    def __call__(self, text: str) -> str:
        """The text as it may leave the machine."""
        text = hide_secrets(text)
        for pattern, instead in _DEVICE_IDS:
            text = pattern.sub(instead, text)
        home = self.host.home.rstrip("/")
        if home:
            text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
        for name, instead in ((self.host.user, "<user>"), (self.host.name, "<host>")):
            if len(name) > 1 and name not in ("root", "localhost"):
                text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", instead, text)
        text = _IPV4.sub(_address, text)
        return _IPV6.sub(_address, text)

    def document(self, value: Any) -> Any:
        """A JSON document with every string in it redacted; names of secrets lose their value."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, list):
            return [self.document(item) for item in value]
        if isinstance(value, dict):
            out = {key: self.document(item) for key, item in value.items()}
            if "value" in out and SECRET_NAME.search(str(value.get("name", ""))):
                out["value"] = "***"
            return out
        return value


def _address(match: re.Match[str]) -> str:
    text = match[0]
    try:
        address = ipaddress.ip_address(text.rstrip("."))
    except ValueError:
        return text
    keep = address.is_loopback or address.is_unspecified
    return text if keep else "<ip>"


Hide = Callable[[str], str]

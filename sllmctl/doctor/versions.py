"""Version numbers of CANN, the driver and Python packages, and their order."""

from __future__ import annotations

import re

Key = tuple[int, ...]

_CANN = re.compile(r"^(\d{1,4})\.(\d{1,4})\.(?:(rc)(\d{1,4})|(\d{1,4}))", re.IGNORECASE)
_DRIVER = re.compile(r"^(\d{1,4})\.(\d{1,4})\.(?:(rc)(\d{1,4})|(\d{1,4}))((?:\.\d{1,4})*)", re.I)
_NUMBERS = re.compile(r"^v?(\d{1,6}(?:\.\d{1,6})*)", re.IGNORECASE)


def cann_base(version: str) -> str:
    """A CANN version without build, alpha or beta: ``9.0.0.b250`` is ``9.0.0``.

    What is no such version (``8.0.T6`` is an internal one) comes back as it is.
    """
    match = _CANN.match(version.strip())
    if not match:
        return version.strip()
    major, minor, _, rc, patch = match.groups()
    return f"{int(major)}.{int(minor)}.{'RC' + rc if rc else patch}"


def cann_key(version: str) -> Key | None:
    """Order of CANN versions, 8.0.RC3 before 8.0.0 before 8.1.RC1; None for an internal one."""
    match = _CANN.match(version.strip())
    if not match:
        return None
    major, minor, _, rc, patch = match.groups()
    return (int(major), int(minor), 0 if rc else 1, int(rc or patch))


def driver_key(version: str) -> Key | None:
    """Order of driver versions, 25.0.rc1 before 25.0.rc1.1 before 25.0.0; builds do not count."""
    match = _DRIVER.match(version.strip())
    if not match:
        return None
    major, minor, _, rc, patch, rest = match.groups()
    more = tuple(int(part) for part in rest.split(".") if part)
    return (int(major), int(minor), 0 if rc else 1, int(rc or patch), *more)


def starts_with(version: str, prefix: str) -> bool:
    """Whether ``25.0.rc1.1`` belongs to ``25.0.rc1`` or ``25.0``, part by part."""
    parts, wanted = version.lower().split("."), prefix.lower().split(".")
    return parts[: len(wanted)] == wanted


def public(version: str) -> str:
    """A Python version without its local part: ``2.6.0+cpu`` is ``2.6.0``."""
    return version.split("+")[0].strip()


def release(version: str) -> Key:
    """The leading numbers of a version: ``2.6.0.post3`` is (2, 6, 0); empty if there are none."""
    match = _NUMBERS.match(version.strip())
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def dotted_in(version: str, low: str, high: str) -> bool:
    """Whether a dotted number lies in a closed interval; ``24.1.`` as the end means any 24.1."""
    key = release(version)
    if not key or not release(low):
        return False
    if high.endswith("."):
        wanted = release(high)
        return release(low) <= key and key[: len(wanted)] == wanted
    return release(low) <= key <= release(high)

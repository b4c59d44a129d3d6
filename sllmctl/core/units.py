"""Sizes and durations: parsed once at the edge, formatted once at the end."""

from __future__ import annotations

import math
import re

from sllmctl.errors import ConfigError

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(I?)B?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Read a size such as ``4GB``, ``1.5 GiB``, ``64k`` or ``4096``, in bytes.

    ``GB`` is 10^9 bytes and ``GiB`` is 2^30, as SI and IEC define them.

    Raises:
        ConfigError: The text is no size, or one of less than a byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ConfigError(
            f"`{text}` is not a size", hint="write it like 512MiB, 4GB or 4096 (bytes)"
        )
    unit = match[2].upper()
    value = float(match[1]) * (_BINARY[unit] if match[3] else _DECIMAL[unit])
    if not 1 <= value < 2**63:
        raise ConfigError(f"the size `{text}` is out of range", hint="use 1 byte to 8 EiB")
    return math.floor(value)


def parse_share(text: str, whole_bytes: int) -> int:
    """Read a size, or a part of a whole such as ``50%``, in bytes.

    Raises:
        ConfigError: The text is neither.
    """
    if not text.strip().endswith("%"):
        return parse_size(text)
    number = text.strip()[:-1]
    if not number.replace(".", "", 1).isdigit() or not 0 < float(number) <= 100:
        raise ConfigError(f"`{text}` is no part of the memory", hint="write it like 50%")
    return int(whole_bytes * float(number) / 100)


def format_size(size_bytes: float) -> str:
    """Write a number of bytes with three significant digits: ``1.19 GB``."""
    value = float(size_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_page_size(page_bytes: int) -> str:
    """Write a size of memory pages, a power of two, as people know it: ``4 KiB``, ``2 MiB``."""
    return f"{page_bytes >> 20} MiB" if page_bytes >= 1 << 20 else f"{page_bytes >> 10} KiB"


def format_seconds(elapsed_s: float) -> str:
    """Write a duration as people say it: ``7.1 ms``, ``2.35 s``, ``3 min 20 s``."""
    if elapsed_s < 0.9995:
        return f"{elapsed_s * 1000:.3g} ms"
    if elapsed_s < 99.95:
        return f"{elapsed_s:.3g} s"
    minutes, seconds = divmod(round(elapsed_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_rate(size_bytes: float, elapsed_s: float) -> str:
    """Write a rate: ``1.82 GB/s``, or a dash when no time passed."""
    return f"{format_size(size_bytes / elapsed_s)}/s" if elapsed_s > 0 else "-"


def format_count(number: int, noun: str) -> str:
    """A number of things, such as ``1 tensor`` or ``1,366 tensors``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

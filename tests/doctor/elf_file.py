"""Smallest ELF files that say what a shared library says."""

from __future__ import annotations

import struct
from collections.abc import Sequence

MACHINES = {"x86_64": 62, "aarch64": 183}
_HEADER, _PROGRAM = 64, 56


def shared_library(
    machine: str = "aarch64",
    needed: Sequence[str] = (),
    versions: Sequence[str] = (),
    runpath: str = "",
) -> bytes:
    """One PT_LOAD over the whole file, a PT_DYNAMIC, strings, and one library's version needs."""
    strings = b"\0"

    def string(text: str) -> int:
        nonlocal strings
        strings += text.encode() + b"\0"
        return len(strings) - len(text) - 1

    tags = [(1, string(name)) for name in needed]
    if runpath:
        tags.append((29, string(runpath)))
    library = string("libstdc++.so.6")
    names = [string(version) for version in versions]
    count = len(tags) + 3 + (2 if versions else 0)
    dynamic_at = _HEADER + 2 * _PROGRAM
    needs_at = dynamic_at + 16 * count
    needs = b""
    if versions:
        needs = struct.pack("<HHIII", 1, len(names), library, 16, 0)
        for i, name in enumerate(names):
            needs += struct.pack("<IHHII", 0, 0, i + 2, name, 16 if i + 1 < len(names) else 0)
    strings_at = needs_at + len(needs)
    tags += [(5, strings_at), (10, len(strings))]
    if versions:
        tags += [(0x6FFFFFFE, needs_at), (0x6FFFFFFF, 1)]
    tags.append((0, 0))
    dynamic = b"".join(struct.pack("<qQ", tag, value) for tag, value in tags)
    total = strings_at + len(strings)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH", 3, MACHINES[machine], 1, 0, _HEADER, 0, 0, 64, 56, 2, 0, 0, 0
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, total, total, 4096)
    dyn = struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, dynamic_at, 0, len(dynamic), len(dynamic), 8)
    return header + load + dyn + dynamic + needs + strings

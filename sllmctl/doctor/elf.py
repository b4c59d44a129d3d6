"""What a shared library says about itself: machine, needed libraries, version needs.

Read from the file: `ldd` would run the loader. Source: elf(5), and the gABI for version needs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64", 3: "i386", 40: "arm"}
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRTAB, _STRSZ, _SONAME, _RPATH, _RUNPATH = 1, 5, 10, 14, 15, 29
_VERNEED, _VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
_MOST_BYTES = 8 << 20

ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Elf:
    """The part of an ELF file's dynamic section that matters here."""

    machine: str
    needed: tuple[str, ...] = ()
    soname: str = ""
    runpath: str = ""
    versions: tuple[str, ...] = ()


def parse_elf(read_at: ReadAt) -> Elf | None:
    """Read a 64-bit little-endian ELF file; None for anything else.

    Args:
        read_at: (offset, size) to bytes; fewer at the end of the file.
    """
    try:
        return _parse(read_at)
    except (struct.error, IndexError, ValueError, OverflowError):
        return None


def _parse(read_at: ReadAt) -> Elf | None:
    head = read_at(0, 64)
    if head[:6] != b"\x7fELF\x02\x01":
        return None
    machine = MACHINES.get(struct.unpack_from("<H", head, 18)[0], "unknown")
    table, entry_bytes, count = _program_headers(head)
    loads, dynamic = [], None
    for i in range(min(count, 64)):
        entry = read_at(table + i * entry_bytes, 56)
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", entry)
        if kind == _LOAD:
            loads.append((address, offset, size))
        elif kind == _DYNAMIC:
            dynamic = (offset, size)
    if dynamic is None:
        return Elf(machine)
    raw = read_at(dynamic[0], min(dynamic[1], 1 << 16))
    tags = list(struct.iter_unpack("<qQ", raw[: len(raw) // 16 * 16]))
    values = dict(reversed(tags))

    def place(address: int) -> int:
        for start, offset, size in loads:
            if start <= address < start + size:
                return int(address - start + offset)
        raise ValueError("an address outside the file")

    if _STRTAB not in values:
        return Elf(machine)
    strings = read_at(place(values[_STRTAB]), min(values.get(_STRSZ, 0), _MOST_BYTES))

    def text(at: int) -> str:
        end = strings.find(b"\0", at)
        return strings[at : end if end >= 0 else len(strings)].decode("utf-8", "replace")

    needed = tuple(text(value) for tag, value in tags if tag == _NEEDED)
    versions: list[str] = []
    if _VERNEED in values:
        at = place(values[_VERNEED])
        versions = _version_needs(read_at, at, values.get(_VERNEEDNUM, 0), text)
    runpath = values.get(_RUNPATH, values.get(_RPATH))
    return Elf(
        machine,
        needed,
        text(values[_SONAME]) if _SONAME in values else "",
        text(runpath) if runpath is not None else "",
        tuple(versions),
    )


def _program_headers(head: bytes) -> tuple[int, int, int]:
    table = struct.unpack_from("<Q", head, 32)[0]
    entry_bytes, count = struct.unpack_from("<HH", head, 54)
    return table, entry_bytes, count


def _version_needs(read_at: ReadAt, at: int, count: int, text: Callable[[int], str]) -> list[str]:
    found = []
    for _ in range(min(count, 64)):
        _, aux_count, _, aux, following = struct.unpack_from("<HHIII", read_at(at, 16))
        aux_at = at + aux
        for _ in range(min(aux_count, 256)):
            _, _, _, name, next_aux = struct.unpack_from("<IHHII", read_at(aux_at, 16))
            found.append(text(name))
            aux_at += next_aux
            if not next_aux:
                break
        if not following:
            break
        at += following
    return found

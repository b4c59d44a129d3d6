"""What the doctor reads of a machine: `npu-smi`, `ascend-dmi`, version files, logs, libraries."""

from __future__ import annotations

from collections.abc import Callable

from sllmctl.doctor.ascend_dmi import parse_ascend_dmi
from sllmctl.doctor.cann_files import key_values, root_of
from sllmctl.doctor.elf import parse_elf
from sllmctl.doctor.host import Host
from sllmctl.doctor.log_signatures import read_log
from sllmctl.doctor.npu_smi import generation, parse_npu_smi
from sllmctl.doctor.proxies import grpc_proxied, http_proxied
from sllmctl.doctor.redact import Redactor
from sllmctl.doctor.tables import driver_verdict, load_tables
from sllmctl.doctor.versions import cann_base, cann_key, dotted_in, driver_key, public, release
from tests.doctor.elf_file import shared_library
from tests.doctor.smi_output import cards, render

TABLES = load_tables()
REDACT = Redactor(Host(user="alice", name="npu-host", home="/home/alice"))
STATUSES = {"ok", "incompatible", "na"}


def _smi(text: str) -> None:
    smi = parse_npu_smi(text)
    for card in smi.cards:
        generation(card.name)
        assert card.npu >= 0
    for process in smi.processes:
        assert process[1] >= 0


def _dmi(text: str) -> None:
    assert {status for _, status in parse_ascend_dmi(text).values()} <= STATUSES


def _files(text: str) -> None:
    assert all(isinstance(value, str) for value in key_values(text).values())
    root = root_of(text)
    assert root is None or text.startswith(root[:1])


def _versions(text: str) -> None:
    parts = text.split(",")
    base = cann_base(text)
    assert cann_key(base) == cann_key(text)
    for read in (driver_key, public, release):
        read(text)
    dotted_in(parts[0], parts[-1], parts[len(parts) // 2])
    verdicts = {driver_verdict(row, text) for row in TABLES.driver}
    assert verdicts <= {"paired", "accepted", "newer", "old", "rejected", "unknown"}


def _log(text: str) -> None:
    for match in read_log(text.splitlines(), TABLES):
        assert 1 <= match.line_number <= text.count("\n") + len(text) + 1
        assert match.count >= 1


def _proxies(text: str) -> None:
    for name in ("no_proxy", "http_proxy"):
        env = {"http_proxy": "http://p:1", name: text}
        for new in (False, True):
            grpc_proxied(env, "127.0.0.1", new=new)
        http_proxied(env, "127.0.0.1")


def _redact(text: str) -> None:
    hidden = REDACT(text)
    assert "\n" not in hidden and "\x1b" not in hidden


READERS: list[Callable[[str], None]] = [
    _smi, _dmi, _files, _versions, _log, _proxies, _redact,
]  # fmt: skip


def doctor(data: bytes) -> None:
    """The first byte chooses the reader; the rest is what it reads."""
    if not data:
        return
    kind, body = data[0] % (len(READERS) + 1), data[1:]
    if kind == len(READERS):
        parse_elf(lambda at, size: body[at : at + size])
    else:
        READERS[kind](body.decode("utf-8", "replace"))


def seeds() -> list[bytes]:
    """Right inputs of each reader."""
    dmi = (
        "Compatibility Check Result\n| Package | Version | Status | Innerversion |\n"
        "| toolkit | 8.1.RC1 | OK | V100R001C21 |\n"
        "| npu-firmware | 7.7.0.1.231 | INCOMPATIBLE PACKAGE | NA |\n"
    )
    texts = [
        render("25.2.0", cards(2), [(0, 0, 4711, "python", 18429)])
        + "dcmi module initialize failed. ret is -8005\n",
        dmi,
        "\ufeffVersion=25.0.rc1.1\r\ncompatible_version_fw=[7.0.0,7.7.99]\r\n"
        "toolkit_running_version=[7.6.0.1.220:8.0.0],[7.7:8.1.RC1]\r\n",
        "8.1.RC1,9.0.0.b250,24.1.rc3.7,2.6.0.post3+cpu,24.1.",
        "OSError: libatb.so: cannot open shared object file\n"
        "error code 207001\n[ERROR] 2025 (PID:1) ERR99999 UNKNOWN\n",
        "localhost, 127.0.0.0/8,*,.local,http://u:p@h:3128",
        "http://user:pass@proxy:3128 hf_abcdefghijkl 10.0.0.1 fe80::1 /home/alice Bearer abcdefgh",
    ]
    found = [bytes([kind]) + text.encode() for kind, text in enumerate(texts)]
    paths = "/usr/local/Ascend/ascend-toolkit/latest/lib64:/usr/local/Ascend/cann-8.5.0/opp"
    found.append(b"\2" + paths.encode())
    library = shared_library("x86_64", ["libc.so.6"], ["GLIBCXX_3.4.30"], "$ORIGIN")
    return [*found, bytes([len(READERS)]) + library]

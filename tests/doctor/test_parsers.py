"""Outside text becomes facts, whatever it looks like."""

from __future__ import annotations

import pytest

from sllmctl.doctor.ascend_dmi import parse_ascend_dmi
from sllmctl.doctor.elf import parse_elf
from sllmctl.doctor.npu_smi import Card, generation, parse_npu_smi
from sllmctl.doctor.tables import driver_verdict, load_tables
from sllmctl.doctor.versions import cann_base, cann_key, dotted_in, driver_key, starts_with
from tests.doctor import fuzz_machines
from tests.doctor.elf_file import shared_library
from tests.doctor.smi_output import cards, render


def test_the_table_of_npu_smi_is_read_back() -> None:
    text = render("25.2.0", cards(2, used=59718), [(1, 0, 1601114, "python", 18429)])
    smi = parse_npu_smi(text)
    assert smi.version == "25.2.0"
    assert smi.cards[1] == Card(1, "910B3", "OK", 0, None, "0000:C2:00.0", 59718, 65536)
    assert smi.processes == [(1, 1601114, "python", 18429)]


def test_two_dies_of_an_a3_card_are_two_chips() -> None:
    chips = cards(1, "Ascend910") * 2
    chips[1] = {**chips[1], "chip": 1, "phy": 1}
    smi = parse_npu_smi(render("25.2.1", chips, a3=True))
    assert [(c.npu, c.chip, c.phy_id) for c in smi.cards] == [(0, 0, 0), (0, 1, 1)]


INFERENCE = """
| npu-smi 24.1.rc2                                 Version: 24.1.rc2                   |
| NPU     Name                  | Health          | Power(W)     Temp(C)   Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                |
| 0       310P3                 | OK              | NA           48                0     / 0     |
| 0       0                     | 0000:01:00.0    | 0            1855 / 44215                    |
"""
NEW = """
| npu-smi 25.7.rc1                                 Version: 25.7.rc1                              |
| NPU ID | Name             | Health        | Power(W)    Temp(C)           Hugepages-Usage(page) |
|        |                  | Bus-Id        | NPU Util(%) Memory-Usage(MB)  HBM-Usage(MB)         |
| 0      | Ascend950PR      | Alarm         | 207.6       65                0     / 0             |
|        |                  | 0000:71:00.0  | 7           0    / 0          5249  / 131072        |
"""
WIDE = """
| NPU   Name                | Health        | Power(W)     Temp(C)   Hugepages |
| Chip  Phy-ID              | Bus-Id        | AICore(%)    Memory-Usage(MB)  HBM-Usage |
| 7     Ascend910           | OK            | 172.0        53        0    / 0  |
| 0     14                  | 0000:81:00.0  | 0            0    / 0     15503/ 65536   |
| NPU     Chip              | Process id    | Process name  | Process memory(MB)  | in container |
| 0       0                 | 692318        | python3       | 12417               | NA           |
"""


@pytest.mark.parametrize(
    ("text", "card"),
    [
        (INFERENCE, Card(0, "310P3", "OK", 0, 0, "0000:01:00.0", 1855, 44215)),
        (NEW, Card(0, "Ascend950PR", "Alarm", 0, None, "0000:71:00.0", 5249, 131072)),
        (WIDE, Card(7, "Ascend910", "OK", 0, 14, "0000:81:00.0", 15503, 65536)),
    ],
)
def test_other_layouts_of_npu_smi(text: str, card: Card) -> None:
    assert parse_npu_smi(text).cards == [card]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("910B3", "A2"), ("910B4-1", "A2"), ("910B2C", "A2"), ("Ascend910", "A3"),
        ("910ProB", "A1"), ("910B", "A1"), ("910A", "A1"), ("310P3", "310P"), ("310B4", "310B"),
        ("Ascend950PR", "A5"), ("Mcu", ""),
    ],
)  # fmt: skip
def test_the_generation_follows_from_the_name(name: str, kind: str) -> None:
    assert generation(name) == kind


def test_versions_of_cann_are_in_order() -> None:
    order = ["8.0.RC1", "8.0.RC2", "8.0.RC3", "8.0.0", "8.1.RC1", "8.3.RC2", "8.5.0", "9.0.1"]
    keys = [cann_key(version) for version in order]
    assert keys == sorted(keys, key=lambda key: key or ())
    assert cann_base("8.2.rc1.alpha003") == "8.2.RC1"
    assert cann_base("9.0.0.b250") == "9.0.0"
    assert cann_key("8.0.T6") is None


def test_versions_of_the_driver_are_in_order() -> None:
    order = ["24.1.rc1", "24.1.rc3", "24.1.rc3.7", "24.1.0", "25.0.rc1", "25.0.rc1.1", "25.2.0"]
    keys = [driver_key(version) for version in order]
    assert keys == sorted(keys, key=lambda key: key or ())
    assert driver_key("26.1.0.b083") == driver_key("26.1.0")
    assert starts_with("25.0.RC1.1", "25.0.rc1")
    assert not starts_with("25.10.0", "25.1")


@pytest.mark.parametrize(
    ("cann", "driver", "verdict"),
    [
        ("8.0.0", "24.1.0", "paired"), ("8.1.RC1", "25.0.rc1.1", "paired"),
        ("8.1.RC1", "24.1.rc1", "old"), ("8.2.RC1", "25.5.1", "newer"),
        ("9.1.0", "25.0.rc1.1", "rejected"), ("9.1.0", "23.0.0", "rejected"),
        ("8.5.0", "25.3.rc1", "accepted"), ("8.5.0", "24.1.0", "old"), ("8.0.0", "?", "unknown"),
    ],
)  # fmt: skip
def test_a_driver_is_judged_by_the_row_of_cann(cann: str, driver: str, verdict: str) -> None:
    row = load_tables().for_cann_driver(cann)
    assert row is not None
    assert driver_verdict(row, driver) == verdict


def test_an_interval_may_end_in_a_prefix() -> None:
    assert dotted_in("7.5.0.1.129", "7.0.0", "7.5.99")
    assert not dotted_in("7.6.0", "7.0.0", "7.5.99")
    assert dotted_in("24.1.5", "24.1", "24.1.")
    assert not dotted_in("24.2.0", "24.1", "24.1.")


def test_a_library_says_what_it_needs() -> None:
    raw = shared_library("x86_64", ["libc10.so", "libtorch_npu.so"], ["GLIBCXX_3.4.30"], "$ORIGIN")
    elf = parse_elf(lambda at, size: raw[at : at + size])
    assert elf is not None
    assert (elf.machine, elf.needed) == ("x86_64", ("libc10.so", "libtorch_npu.so"))
    assert (elf.runpath, elf.versions) == ("$ORIGIN", ("GLIBCXX_3.4.30",))


def test_a_library_of_this_system_is_read() -> None:
    """Any real library will do: the C module that this test process has loaded."""
    import _ctypes
    from pathlib import Path

    raw = Path(_ctypes.__file__).read_bytes()
    elf = parse_elf(lambda at, size: raw[at : at + size])
    assert elf is not None
    assert any(name.startswith("libc.so") for name in elf.needed)
    assert any(name.startswith("GLIBC_2.") for name in elf.versions)


def test_damaged_machines_break_no_check() -> None:
    fuzz_machines.run(15)


def test_ascend_dmi_is_read_as_a_table_or_as_columns() -> None:
    table = (
        "Compatibility Check Result\n"
        "| Package | Version | Status | Innerversion | Dependencies |\n"
        "| toolkit | 8.1.RC1 | OK | V100R001C21 | npu-driver |\n"
        "| npu-firmware | 7.5.0.1.129 | INCOMPATIBLE PACKAGE | NA | NA |\n"
        "| toolbox | | NA | NA | NA |\n"
    )
    wanted = {
        "toolkit": ("8.1.RC1", "ok"),
        "npu-firmware": ("7.5.0.1.129", "incompatible"),
        "toolbox": ("", "na"),
    }
    assert parse_ascend_dmi(table) == wanted
    columns = "\n".join("   ".join(line.strip("| ").split(" | ")) for line in table.splitlines())
    assert parse_ascend_dmi(columns.replace("| NA", "NA")) == wanted
    assert parse_ascend_dmi("Failed to load the libdcmi.so dynamic library.\ntoolkit\n") == {}

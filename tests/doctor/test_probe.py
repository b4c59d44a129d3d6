"""The probe on this machine and on hostile trees."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from sllmctl.doctor.check import Status
from sllmctl.doctor.examine import examine
from sllmctl.doctor.host import Host
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.probe import Probe
from sllmctl.doctor.tree_probe import TreeProbe
from tests.doctor.tree import A, Tree, good


def test_links_of_a_tree_stay_inside_it(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    (root / "inside").mkdir(parents=True)
    (root / "inside/passwd").write_text("of the tree")
    (root / "etc").symlink_to("/inside")
    (root / "up").symlink_to("../../../../../etc")
    (root / "loop").symlink_to("loop")
    probe = TreeProbe(root)
    assert probe.read_text("/etc/passwd") == "of the tree"
    assert probe.read_text("/up/passwd") == "of the tree"
    assert probe.read_text("/loop") is None and probe.lexists("/loop")
    assert probe.realpath("/etc/passwd") == "/inside/passwd"


def test_a_child_that_hangs_is_killed_with_its_children() -> None:
    ran = Probe().run([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.05)
    assert ran.code is None


def test_a_command_that_is_not_there_is_127() -> None:
    assert Probe().run(["no-such-command-of-any-kind"]).code == 127


def test_direct_io_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    assert Probe().direct_io(str(tmp_path)) in (True, False)
    assert list(tmp_path.iterdir()) == []
    assert Probe().direct_io("/nonexistent") is None


def test_the_process_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", "/x")
    host = Host.here()
    assert host.python == ".".join(map(str, sys.version_info[:3]))
    assert host.env["ASCEND_HOME_PATH"] == "/x"
    assert host.machine == os.uname().machine


HOSTILE = {
    "binary": b"\x7fELF\x02\x01" + os.urandom(4096),
    "CRLF and BOM": "\ufeffversion=8.1.RC1\r\nVersion=25.0.rc1.1\r\n".encode(),
    "latin-1": "Version=25.0.rc1\xe9\nversion=8.1.RC1\xff".encode("latin-1"),
    "large": b"Version=" + b"9" * (10 << 20),
    "empty": b"",
    "JSON": b'{"version": [[[[[[',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_break_no_check(kind: str, place: Path) -> None:
    tree = good(Tree(place))
    for path in sorted(place.rglob("*")):
        if path.is_file() and path.suffix in (
            ".info",
            ".cfg",
            ".so",
            ".json",
            ".py",
            ".cmake",
            ".0",
        ):
            path.write_bytes(HOSTILE[kind][: 1 << 20] if kind != "large" else HOSTILE[kind][:65536])
    tree.file(f"{A}/driver/version.info", HOSTILE[kind])
    tree.file("proc/meminfo", HOSTILE[kind])
    tree.file("proc/self/mountinfo", HOSTILE[kind])
    tree.file("proc/net/tcp", HOSTILE[kind])
    done = examine(Machine(TreeProbe(tree.write())))
    assert not done.of(Status.ERROR), [str(o.finding.summary) for o in done.of(Status.ERROR)]


def test_unreadable_files_and_loops_break_no_check(place: Path) -> None:
    tree = good(Tree(place))
    tree.link(f"{A}/driver/version.info", "version.info")
    tree.link(f"{A}/ascend-toolkit/latest", "latest")
    tree.remove("proc/meminfo")
    (place / "proc/meminfo").mkdir()
    (place / A / "firmware/version.info").chmod(0)
    done = examine(Machine(TreeProbe(tree.write())))
    assert not done.of(Status.ERROR)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"host": {}}'])
def test_a_tree_without_a_description_is_a_machine_too(text: str, tmp_path: Path) -> None:
    if text:
        (tmp_path / "machine.json").write_text(text)
    done = examine(Machine(TreeProbe(tmp_path)))
    assert done.machine.profiles == ("convert",)
    assert not done.of(Status.ERROR)
    assert json.dumps(done.exit_code()) == "3"  # there is no torch

"""The probe on this machine and on hostile trees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sllmctl.doctor.check import Status
from sllmctl.doctor.examine import examine
from sllmctl.doctor.host import Host
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.npu_smi import parse_npu_smi
from sllmctl.doctor.probe import RUN_BYTES, Probe
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
    assert Probe().direct_io(str(tmp_path / "none")) is None


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


@pytest.mark.parametrize("text", ["", "{}", '{"host": {}}'])
def test_a_tree_without_a_description_is_a_machine_too(text: str, tmp_path: Path) -> None:
    if text:
        (tmp_path / "machine.json").write_text(text)
    done = examine(Machine(TreeProbe(tmp_path)))
    assert done.machine.profiles == ("convert",)
    assert not done.of(Status.ERROR)
    assert json.dumps(done.exit_code()) == "3"  # there is no torch


def test_a_command_that_never_stops_talking_is_cut() -> None:
    script = "import sys\nwhile True: sys.stdout.buffer.write(b'x' * 65536)"
    ran = Probe().run([sys.executable, "-c", script], timeout_s=1.0)
    assert ran.code is None
    script = "import sys\nsys.stdout.buffer.write(b'x' * (8 << 20))"
    ran = Probe().run([sys.executable, "-c", script])
    assert (ran.code, len(ran.out)) == (0, RUN_BYTES)


def test_a_command_that_leaves_somebody_behind_has_ended() -> None:
    """A grandchild keeps the pipe open: what was said counts, and it is ended too."""
    inner = "import time; time.sleep(600)"
    script = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {inner!r}])\n"
        "print(child.pid, flush=True)\n"
    )
    ran = Probe().run([sys.executable, "-c", script])
    assert ran.code == 0
    ends_s = time.monotonic() + 30  # it is killed at once, and buried when the kernel likes
    while _running(int(ran.out)):
        assert time.monotonic() < ends_s
        time.sleep(0.01)


def _running(pid: int) -> bool:
    """Whether a process is at work."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def test_a_command_that_speaks_another_encoding_is_read(tmp_path: Path) -> None:
    tool = tmp_path / "npu-smi"
    tool.write_text(
        "#!/bin/sh\nprintf '| 0     910B3 | \\325\\375\\263\\243 | 98.8 35 0 / 0 |\\n'\n"
        "printf '| 0 | 0000:82:00.0  | 0 0 / 0 3400 / 65536 |\\n'; printf '\\377\\376' >&2\n"
    )
    tool.chmod(0o755)
    ran = Probe().run([str(tool), "info"])
    assert ran.code == 0
    assert parse_npu_smi(ran.out).cards[0].name == "910B3"


def test_a_directory_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {sys.executable} -c 'from sllmctl.cli import app; "
    script += 'app(["doctor", "--only", "ENV,PY002,IO"])\''
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    assert "Traceback" not in done.stderr

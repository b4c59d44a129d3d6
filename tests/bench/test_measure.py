"""A sample is one child process: its result, its failure, its end; and a digest of every byte."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from sllmctl.bench import measure
from sllmctl.bench.measure import Forked, Held, Sample, measure_load, read_every_byte, run_forked
from sllmctl.errors import SllmError
from tests.conftest import some_tensors

DEADLINE_S = 120
U8 = torch.uint8


def test_a_sample_comes_from_another_process() -> None:
    sample = run_forked(lambda: Sample(1.5, check=str(os.getpid())), deadline_s=DEADLINE_S)
    assert sample.ready_s == 1.5
    assert sample.check != str(os.getpid())


def test_a_failure_is_told_in_one_line() -> None:
    def fail() -> Sample:
        raise ValueError("first\nsecond")

    with pytest.raises(SllmError, match=r"^ValueError: first$"):
        run_forked(fail, deadline_s=DEADLINE_S)


def test_a_crash_names_the_signal() -> None:
    def crash() -> Sample:
        os.kill(os.getpid(), signal.SIGKILL)
        return Sample(0)

    with pytest.raises(SllmError, match="SIGKILL"):
        run_forked(crash, deadline_s=DEADLINE_S)


def test_a_deadline_ends_the_child_and_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def hang() -> Sample:
        child = subprocess.Popen(["sleep", "600"])
        note.write_text(str(child.pid))
        time.sleep(600)
        return Sample(0)

    with Forked(hang) as child:
        while not (note.exists() and note.read_text()):
            time.sleep(0.01)
        with pytest.raises(SllmError, match="deadline"):
            child.result(time.monotonic())
    pid = int(note.read_text())
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child's child lives")


def test_what_a_child_prints_stays_out_of_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    def shout() -> Sample:
        os.write(1, b"noise\n")
        return Sample(0)

    run_forked(shout, deadline_s=DEADLINE_S)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "noise\n")


def test_peak_and_own_memory_are_those_of_the_load() -> None:
    nbytes = 64 * 2**20

    def sample() -> Sample:
        # Not filled by torch: its threads hang in a child of a process that has used them.
        return measure_load(lambda: Held({"a": torch.frombuffer(bytearray(nbytes), dtype=U8)}))

    pretouched = run_forked(sample, deadline_s=DEADLINE_S, pretouch_bytes=4 * nbytes)
    assert nbytes <= pretouched.private_bytes < 1.5 * nbytes
    assert nbytes <= pretouched.peak_bytes < 1.5 * nbytes
    assert pretouched.all_s is not None and pretouched.all_s > pretouched.ready_s


def test_a_child_owns_its_memory_and_copies_no_page_of_its_parent_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = 2000
    parents = memoryview(bytearray(4096 * pages))

    def faults_of_writing() -> Sample:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        parents[::4096] = b"x" * pages
        return Sample(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    owned = run_forked(faults_of_writing, deadline_s=DEADLINE_S)
    monkeypatch.setattr(measure, "own_memory", lambda: None)
    shared = run_forked(faults_of_writing, deadline_s=DEADLINE_S)
    assert shared.ready_s > pages / 2
    assert owned.ready_s < pages / 20


def test_children_of_a_child_end_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def hang() -> Sample:
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(600)
        raise AssertionError

    def lead() -> Sample:
        with Forked(hang, leads=False) as one, Forked(hang, leads=False):
            return one.result(time.monotonic() + 600)

    with Forked(lead):
        while not pids.exists() or pids.read_text().count("\n") < 2:
            time.sleep(0.02)
    for pid in map(int, pids.read_text().split()):
        deadline = time.monotonic() + 10
        while _runs(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_digest_depends_on_neither_order_nor_alignment() -> None:
    tensors = some_tensors()
    expected = read_every_byte(tensors)
    assert read_every_byte(dict(reversed(tensors.items()))) == expected
    moved = {}
    for name, tensor in tensors.items():
        raw = ctypes.create_string_buffer(tensor.nbytes + 1)
        view = torch.frombuffer(raw, dtype=torch.uint8)[1:]
        view.copy_(tensor.reshape(-1).view(torch.uint8))
        moved[name] = view
    assert read_every_byte(moved) == expected


def test_the_digest_sees_every_bit_and_every_name() -> None:
    data = torch.zeros(9 * 2**20, dtype=torch.uint8)  # more than two blocks
    seen = {read_every_byte({"a": data, "b": data[:4]})}
    for position in (0, 4 * 2**20, len(data) - 1):
        changed = data.clone()
        changed[position] = 1
        seen.add(read_every_byte({"a": changed, "b": data[:4]}))
    seen.add(read_every_byte({"a": data[:4], "b": data}))
    seen.add(read_every_byte({"a": data}))
    assert len(seen) == 6

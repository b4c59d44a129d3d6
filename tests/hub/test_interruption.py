"""The client's process ends with ours, however ours ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import MIB, NAME

from sllmctl.core.hub.cache import cache_root
from sllmctl.core.hub.fetch import fetch

SHARD = "model-00001-of-00002.safetensors"
DEADLINE_S = 30.0


@pytest.fixture
def running(hugging_face, model):
    """A process that is in the middle of a download, and the process of its client."""
    hugging_face.add(NAME, model)
    hugging_face.trouble.stall_at[SHARD] = 2 * MIB
    code = f"from sllmctl.core.hub.fetch import fetch; fetch({NAME!r}, hub='huggingface')"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
    )
    try:
        assert hugging_face.stalled.wait(DEADLINE_S)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield process, int(child)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def test_ctrl_c_ends_the_client_with_the_command(running):
    process, child = running
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGINT
    assert errors.decode().strip().endswith("KeyboardInterrupt")
    # It was waited for, not left behind.
    assert not Path(f"/proc/{child}").exists()


def test_a_killed_command_takes_the_client_along(running):
    process, child = running
    process.kill()
    process.wait(DEADLINE_S)
    wait_until_gone(child)


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_an_interrupt_in_the_progress_call_leaves_no_process(hub, hugging_face, modelscope, model):
    server = {"huggingface": hugging_face, "modelscope": modelscope}[hub]
    server.add(NAME, model)
    server.trouble.stall_at[SHARD] = 2 * MIB
    before = children()

    def interrupt(stage, done_bytes, total_bytes):
        if server.stalled.is_set():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, hub=hub, progress=interrupt)
    assert children() == before


def test_two_downloads_of_one_model_share_the_work(hugging_face, model):
    hugging_face.add(NAME, model)
    code = (
        f"from sllmctl.core.hub.fetch import fetch; print(fetch({NAME!r}, hub='huggingface').path)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert hugging_face.bytes_sent[SHARD] == len(model[SHARD])
    assert (Path(outputs[0].decode().strip()) / SHARD).read_bytes() == model[SHARD]
    assert not list(cache_root("huggingface").rglob("*.incomplete"))


def children() -> set[str]:
    """Processes that this one started and has not waited for, from any of its threads."""
    found = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update((task / "children").read_text().split())
    return found


def wait_until_gone(pid: int) -> None:
    """Wait for a process that is not ours to end; a zombie that nobody reaps has ended."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state in "ZX":
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} outlived its parent")

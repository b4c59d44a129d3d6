"""Asking a store at its socket, whoever listens there."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sllmctl import __version__
from sllmctl.doctor.host import Host
from sllmctl.doctor.probe import Probe
from sllmctl.doctor.store_answer import ask_store
from tests.doctor.conftest import Doctor

SHORT_S = 0.3


@contextmanager
def listener(path: Path, behave: Callable[[socket.socket], None]) -> Iterator[None]:
    """Somebody who listens at the path, and does as said with the first who comes."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def run() -> None:
            client, _ = server.accept()
            with client:
                behave(client)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join()


def says(*lines: bytes) -> Callable[[socket.socket], None]:
    def behave(client: socket.socket) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may hang up early
            client.sendall(b"".join(lines))
            while_open(client)

    return behave


def while_open(client: socket.socket) -> None:
    while client.recv(4096):
        pass


def test_a_store_says_what_it_is(doctor: Doctor, tmp_path: Path) -> None:
    path = tmp_path / "store.sock"
    store = subprocess.Popen(
        [
            *(sys.executable, "-m", "sllmctl", "serve", "--mem-pool-size", "16MiB"),
            *("--socket", str(path), "--storage-path", str(tmp_path), "--segment-size", "2MiB"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert store.stdout is not None
        assert any(line.startswith("ready") for line in store.stdout)
        found = ask_store(str(path))
        os.environ["SLLMCTL_SOCKET"] = str(path)
        try:
            document = json.loads(doctor("--only", "SVC", "--json").stdout)
        finally:
            del os.environ["SLLMCTL_SOCKET"]
    finally:
        store.terminate()
        store.communicate(timeout=30)
    assert (found.problem, found.hello["sllmctl"]) == ("", __version__)
    assert found.status["pool"]["bytes"] == 16 << 20
    status = {check["id"]: check["status"] for check in document["checks"]}
    assert (status["SVC001"], status["SVC002"], status["SVC003"]) == ("pass", "pass", "pass")
    assert Probe().ask_store(str(path)).problem in ("refused", "no socket")


@pytest.mark.parametrize(
    ("behave", "problem"),
    [
        (lambda client: client.recv(4096), "it has closed the connection"),
        (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "a line that is no JSON"),
        (says(b'{"event": "error", "message": "no"}\n', b"{}\n"), "no"),
        (says(b'{"fds": 3}\n'), "descriptors says 3"),
        (says(b"[" * (2 << 20)), "a message of more than"),
    ],
    ids=["mute", "another server", "refusing", "lying", "flooding"],
)
def test_whoever_answers_otherwise_is_no_store(
    tmp_path: Path, behave: Callable[[socket.socket], None], problem: str
) -> None:
    path = tmp_path / "sock"
    with listener(path, behave):
        found = ask_store(str(path))
    assert problem in found.problem
    assert not found.hello and not found.status


def test_a_store_that_says_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with listener(path, while_open):
        assert ask_store(str(path), SHORT_S).problem == "it says nothing"


def test_a_status_that_is_refused_leaves_the_greeting(tmp_path: Path) -> None:
    hello = json.dumps({"event": "hello", "version": 1, "sllmctl": "0.1.0"}).encode() + b"\n"
    with listener(tmp_path / "sock", says(hello, b'{"event": "error", "message": "no"}\n')):
        found = ask_store(str(tmp_path / "sock"))
    assert found.hello["sllmctl"] == "0.1.0" and found.status == {} and found.problem == ""


def test_what_is_left_over_or_no_socket_is_told_apart(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "left"))
    (tmp_path / "file").write_text("")
    probe = Probe(Host())
    assert probe.ask_store(str(tmp_path / "left")).problem == "refused"
    assert probe.ask_store(str(tmp_path / "file")).problem == "no socket"
    assert probe.ask_store(str(tmp_path / "none")).problem == "no socket"
    assert ask_store("/" + "x" * 200).problem == "AF_UNIX path too long"

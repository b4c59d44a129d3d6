"""A client whose store is another version, or no store at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sllmctl import api
from sllmctl.core.background import Loading
from sllmctl.errors import (
    CheckpointError,
    CheckpointNotFound,
    NativeError,
    StoreError,
    StoreUnreachable,
)
from sllmctl.store import manage
from sllmctl.store.client import StoreClient
from sllmctl.store.named import NamedModel
from sllmctl.store.protocol import close_fds, encode

HELLO = {"event": "hello", "version": 1, "segment_bytes": 2 * 2**20}
Answer = Callable[..., Path]


@pytest.fixture
def answer(tmp_path: Path) -> Iterator[Answer]:
    """Answer one client's requests, in their order, with these messages."""
    path = tmp_path / "s"
    threads: list[threading.Thread] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:

        def start(*answers: dict[str, Any] | list[dict[str, Any]]) -> Path:
            listener.bind(str(path))
            listener.listen(1)
            threads.append(threading.Thread(target=serve, args=answers, daemon=True))
            threads[0].start()
            return path

        def serve(*answers: dict[str, Any] | list[dict[str, Any]]) -> None:
            sock, _ = listener.accept()
            with sock, sock.makefile("rb") as requests:
                for line, messages in zip(requests, answers, strict=False):
                    assert json.loads(line)["op"]
                    for one in messages if isinstance(messages, list) else [messages]:
                        sock.sendall(encode(one))
                requests.read()

        yield start
        for thread in threads:
            thread.join(10)


def test_a_model_whose_files_changed_while_the_store_read_them_is_refused(answer: Answer) -> None:
    attached = {"event": "attached", "shards": 1, "coming": []}
    files = {"event": "files", "names": ["m.safetensors"], "sizes": [2**20]}
    settled = {"event": "settled", "reason": "the files changed while they were read"}
    with (
        StoreClient(answer(HELLO, [attached, files, settled])) as client,
        pytest.raises(CheckpointError, match="files of `m` changed while the store read them"),
    ):
        NamedModel(client, "m")


@pytest.mark.parametrize("nonsense", [{}, *({"segment_bytes": n} for n in (0, -4096, 5, "x", 1e6))])
def test_a_load_does_without_a_store_whose_hello_makes_no_sense(
    answer: Answer, tiny_checkpoint: Path, nonsense: dict[str, Any]
) -> None:
    path = answer({"event": "hello", "version": 1, **nonsense})
    loaded = api.load(tiny_checkpoint, store="auto", socket=path)
    assert loaded.tensors


def test_a_load_that_requires_a_store_refuses_one_whose_hello_makes_no_sense(
    answer: Answer, tiny_checkpoint: Path
) -> None:
    path = answer({"event": "hello", "version": 1})
    with pytest.raises(StoreError, match="not a store of sllmctl"):
        api.load(tiny_checkpoint, store="require", socket=path)


def test_a_store_that_refused_and_hung_up_is_heard_by_who_sends_to_it(tmp_path: Path) -> None:
    refusal = {"event": "error", "message": "this store speaks version 2 of the protocol"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        with StoreClient(tmp_path / "s") as client:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(encode(refusal))
            with pytest.raises(StoreError, match="speaks version 2"):
                client.ask({"op": "status"})


def test_a_load_does_without_a_store_that_says_nothing_and_tells_why_it_waited(
    answer: Answer,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stopped store still takes connections: the kernel does that for it."""
    monkeypatch.setattr("sllmctl.store.client.HELLO_DEADLINE_S", 0.2)
    path = answer([])
    assert api.load(tiny_checkpoint, store="auto", socket=path).tensors
    assert "(the store has said nothing for 0 s); it goes to disk" in caplog.text


def test_a_silent_store_is_no_store_without_the_model(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sllmctl.store.client.HELLO_DEADLINE_S", 0.2)
    path = answer([])
    with pytest.raises(StoreUnreachable, match="said nothing"):
        api.load("org/m", storage_path=tmp_path, store="require", socket=path)


def test_a_model_that_is_not_here_is_not_found_whatever_a_silent_store_may_have(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sllmctl.store.client.HELLO_DEADLINE_S", 0.2)
    path = answer([])
    with pytest.raises(CheckpointNotFound) as missing:
        api.load("org/m", storage_path=tmp_path, store="auto", socket=path)
    assert "the store has none" not in str(missing.value)


def test_a_load_that_is_cancelled_does_not_wait_for_a_silent_store(
    answer: Answer, tiny_checkpoint: Path
) -> None:
    path = answer([])
    with Loading(
        lambda watch: api.load(tiny_checkpoint, store="require", socket=path, progress=watch), None
    ) as loading:
        loading.cancel()
        with pytest.raises(NativeError, match="cancelled"):
            loading.wait()


@pytest.mark.parametrize("figures", [{"disk_bytes": 1e999}, {"disk_bytes": -5, "cache_bytes": 5}])
def test_a_store_whose_figures_make_no_sense_costs_no_load(
    answer: Answer, tiny_checkpoint: Path, figures: dict[str, Any]
) -> None:
    attached = {"event": "attached", "shards": 1, "coming": []}
    settled = {"event": "settled", "reason": None, **figures}
    path = answer(HELLO, [], [attached, settled])
    assert api.load(tiny_checkpoint, store="require", socket=path).tensors


def test_a_store_that_lists_files_of_endless_parts_is_refused(answer: Answer) -> None:
    attached = {"event": "attached", "shards": 1, "coming": []}
    files = {"event": "files", "names": ["m.safetensors"], "sizes": [10**18]}
    with (
        StoreClient(answer(HELLO, [attached, files])) as client,
        pytest.raises(StoreError, match="more than 65536 parts"),
    ):
        NamedModel(client, "m")


@pytest.mark.parametrize("nonsense", [{}, {"event": "status"}, {"bytes": "x", "warm_bytes": 1}])
@pytest.mark.parametrize(
    "ask", [manage.status, partial(manage.warm, "m"), partial(manage.evict, "m")]
)
def test_an_answer_that_makes_no_sense_is_an_error_of_the_stores(
    answer: Answer, ask: Callable[..., object], nonsense: dict[str, Any]
) -> None:
    with pytest.raises(StoreError, match="the store's (answer|status)"):
        ask(socket=answer(HELLO, nonsense))


def test_a_client_whose_descriptor_is_above_1023_is_answered(answer: Answer) -> None:
    path = answer([HELLO, {}])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this process may not have so many descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    held = []
    try:
        while not held or held[-1] < 1024:
            held.append(os.dup(0))
        with StoreClient(path) as client:
            client.receive()
            assert client.segment_bytes == HELLO["segment_bytes"]
    finally:
        close_fds(held)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_for_which_too_many_are_on_their_way_are_sent_when_there_is_room(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    send, refused = socket.send_fds, []

    def crowded(*args: Any) -> int:
        if len(refused) < 3:
            refused.append(args)
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")
        return send(*args)

    path = answer(HELLO, {"event": "attached"})
    monkeypatch.setattr("sllmctl.store.client.socket.send_fds", crowded)
    fd = os.open(tiny_checkpoint, os.O_RDONLY)
    with StoreClient(path) as client:
        client.send_shards(["m"], [fd])
        assert client.receive()[0]["event"] == "attached"
        monkeypatch.setattr("sllmctl.store.client._CROWDED_DEADLINE_S", 0.05)
        refused[:] = []
        monkeypatch.setattr("sllmctl.store.client._CROWDED_S", 0.1)
        with pytest.raises(StoreUnreachable, match="Too many references"):
            client.send_shards(["m"], [fd])
    os.close(fd)

"""A client whose store is another version, or no store at all."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sllmctl.errors import CheckpointError
from sllmctl.store.client import StoreClient
from sllmctl.store.named import NamedModel
from sllmctl.store.protocol import encode

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
            threads.append(threading.Thread(target=serve, args=answers))
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
            thread.join(30)


def test_a_model_whose_files_changed_while_the_store_read_them_is_refused(answer: Answer) -> None:
    attached = {"event": "attached", "shards": 1, "coming": []}
    files = {"event": "files", "names": ["m.safetensors"], "sizes": [2**20]}
    settled = {"event": "settled", "reason": "the files changed while they were read"}
    with (
        StoreClient(answer(HELLO, [attached, files, settled])) as client,
        pytest.raises(CheckpointError, match="files of `m` changed while the store read them"),
    ):
        NamedModel(client, "m")

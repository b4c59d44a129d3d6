"""A whole SGLang behind HTTP: the tokens of its own loader, served from a warm store alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sllmctl.store.client import StoreClient
from tests.engines.conftest import Playground

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed: see `make test-engines`", allow_module_level=True)

PROMPTS = ["Hello, my name is", "The capital of France is"]
START_S = 400
FLAGS = {
    "host": "127.0.0.1",
    "device": "cpu",
    "dtype": "bfloat16",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "mem-fraction-static": "0.05",
    "max-total-tokens": "2048",
    "context-length": "128",
    "max-running-requests": "4",
    "served-model-name": "tiny",
}
SWITCHES = ("disable-cuda-graph", "disable-overlap-schedule", "disable-radix-cache")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """A running SGLang, asked by HTTP."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def tokens(self) -> list[list[int]]:
        sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        answers = self.ask("/generate", {"text": PROMPTS, "sampling_params": sampling})
        return [answer["output_ids"] for answer in answers]


@contextmanager
def sglang(
    path: Path, log: Path, ranks: int = 1, extra: dict[str, str] | None = None
) -> Iterator[Server]:
    """Start `sglang.launch_server`, wait until it serves, and end it with all its processes."""
    port = free_port()
    flags = {**FLAGS, "model-path": str(path), "port": str(port), "tp-size": str(ranks)}
    if extra:
        flags["model-loader-extra-config"] = json.dumps({"sllm": extra})
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    arguments += [f"--{name}" for name in SWITCHES]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLLMCTL_")},
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
    server = Server(port)
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            try:
                server.ask("/v1/models")
                break
            except OSError:
                time.sleep(1)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


@pytest.fixture(scope="module")
def store(playground: Playground) -> Iterator[Path]:
    """A store that has the model warm, and a storage path that has its files no more."""
    path = playground.converted("qwen3")
    address = playground.root / "store.sock"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "sllmctl", "serve", "--mem-pool-size", "64MiB"),
            *("--socket", str(address), "--storage-path", str(playground.storage)),
            *("--preload", "qwen3"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=playground.root,
    )
    assert process.stdout is not None
    while "ready" not in (line := process.stdout.readline()):
        assert line, "the store ended"
    deadline = time.monotonic() + 60
    while warm_bytes(address) != path_bytes(path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    path.rename(playground.root / "moved-away")
    yield address
    process.terminate()
    assert process.wait(30) == 0


def path_bytes(path: Path) -> int:
    return sum(shard.stat().st_size for shard in path.glob("*.safetensors"))


def status(address: Path) -> dict[str, Any]:
    with StoreClient(address) as client:
        return dict(client.ask({"op": "status"}))


def warm_bytes(address: Path) -> int:
    return sum(model["warm_bytes"] for model in status(address)["models"])


def from_the_store(playground: Playground, address: Path) -> dict[str, str]:
    return {
        "model": "qwen3",
        "storage_path": str(playground.storage),
        "store": "require",
        "socket": str(address),
    }


def test_a_server_without_weight_files_answers_as_sglang_does(
    playground: Playground, store: Path, tmp_path: Path
) -> None:
    extra = from_the_store(playground, store)
    with sglang(playground.source("qwen3"), tmp_path / "own.log") as server:
        expected = server.tokens()
    before = status(store)["counters"]
    with sglang(playground.bare("qwen3"), tmp_path / "ours.log", extra=extra) as server:
        assert server.tokens() == expected
        assert [model["id"] for model in server.ask("/v1/models")["data"]] == ["tiny"]
        body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}
        assert server.ask("/v1/completions", body)["choices"][0]["text"]
        from openai import OpenAI

        client = OpenAI(base_url=f"{server.base}/v1", api_key="none", timeout=120)
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=8,
            temperature=0,
        )
        assert chat.choices[0].message.content
    assert "from the store" in (tmp_path / "ours.log").read_text()
    counted = status(store)["counters"]
    assert counted["bytes_warm"] - before["bytes_warm"] == warm_bytes(store)
    assert counted["bytes_disk"] == before["bytes_disk"]


def test_two_ranks_share_the_store_and_answer_as_sglang_does(
    playground: Playground, store: Path, tmp_path: Path
) -> None:
    with sglang(playground.source("qwen3"), tmp_path / "own.log", 2) as server:
        expected = server.tokens()
    extra = from_the_store(playground, store)
    with sglang(playground.bare("qwen3"), tmp_path / "ours.log", 2, extra) as server:
        assert server.tokens() == expected
    log = (tmp_path / "ours.log").read_text()
    for rank in range(2):
        assert f"process {rank} of 2 here: 25 tensors, 853504 bytes: 853504 from the store" in log

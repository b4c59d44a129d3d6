"""Whole vLLM engines that load through us: tokens, a store that is asked, a server that answers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import Playground
from tests.store.conftest import RunningStore

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: see `make test-engines`", allow_module_level=True)

ENGINE = Path(__file__).with_name("vllm_engine.py")
MODELS = ("qwen3", "qwen3-tied", "llama", "opt", "qwen3-moe", "qwen3-int8")
SERVER_DEADLINE_S = 600.0


def environment(playground: Playground) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLLMCTL_")},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(playground.root / "hf"),
        "SLLMCTL_SOCKET": str(playground.root / "store.sock"),
        "SLLMCTL_STORAGE_PATH": str(playground.storage),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


class Engines:
    """A process that runs one engine after the other."""

    def __init__(self, playground: Playground) -> None:
        self.log = playground.root / "engines.log"
        # The engine itself runs in that process too, which sees why a start failed.
        alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self._process = subprocess.Popen(
            [sys.executable, str(ENGINE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=environment(playground) | alone,
            text=True,
        )

    def run(self, model: Path | str, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"model": str(model), **job}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.log.read_text()[-4000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tokens(self, model: Path | str, **job: Any) -> list[list[int]]:
        answer = self.run(model, **job)
        assert "error" not in answer, answer
        found: list[list[int]] = answer["tokens"]
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def store(playground: Playground) -> Iterator[RunningStore]:
    running = RunningStore(playground.root)
    yield running
    running.end()


@pytest.fixture(scope="module")
def engines(playground: Playground, store: RunningStore) -> Iterator[Engines]:
    running = Engines(playground)
    yield running
    running.end()


def ours(**extra: Any) -> dict[str, Any]:
    return {"load_format": "sllm", "model_loader_extra_config": extra}


def counters(store: RunningStore) -> dict[str, int]:
    found: dict[str, int] = store.status()["counters"]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_vllms_own_loader(
    engines: Engines, playground: Playground, store: RunningStore, name: str, ranks: int
) -> None:
    parallel = {"tensor_parallel_size": ranks}
    expected = engines.tokens(playground.source(name), **parallel)
    playground.converted(name)
    before = counters(store)
    extra = ours(model=name, store="require")
    assert engines.tokens(playground.bare(name), **extra, **parallel) == expected
    after = counters(store)
    # Each rank has a lease of its own, and what one brought in is warm for the other.
    assert after["loads"] - before["loads"] == ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_warm_start_needs_no_files(
    engines: Engines, playground: Playground, store: RunningStore, ranks: int
) -> None:
    parallel = {"tensor_parallel_size": ranks}
    extra = ours(model="qwen3", store="require")
    path, away = playground.converted("qwen3"), playground.root / "away"
    expected = engines.tokens(playground.bare("qwen3"), **extra, **parallel)
    before = counters(store)
    path.rename(away)
    try:
        assert engines.tokens(playground.bare("qwen3"), **extra, **parallel) == expected
        after = counters(store)
    finally:
        away.rename(path)
    size = (path / "model.safetensors").stat().st_size
    assert after["bytes_disk"] == before["bytes_disk"]
    assert after["bytes_warm"] - before["bytes_warm"] == ranks * size
    assert f"{ranks} here: 25 tensors, 853504 bytes: 853504 from the store, " in (
        engines.log.read_text()
    )


def test_a_name_of_a_hub_takes_the_configuration_from_its_cache(
    engines: Engines, playground: Playground
) -> None:
    expected = engines.tokens(playground.source("qwen3"))
    commit = "0123456789" * 4
    repository = playground.root / "hf" / "hub" / "models--tiny--qwen3"
    shutil.copytree(playground.bare("qwen3"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(playground.converted("qwen3"), playground.storage / "tiny" / "qwen3")
    assert engines.tokens("tiny/qwen3", load_format="serverless_llm") == expected


def test_convert_writes_the_rank_state_that_an_engine_then_requires(
    engines: Engines, playground: Playground
) -> None:
    expected = engines.tokens(playground.source("qwen3"), tensor_parallel_size=2)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sllmctl", "convert", str(playground.source("qwen3"))),
            *("--output", str(playground.storage / "ranked"), "--json"),
            *("--engine", "vllm", "--tensor-parallel-size", "2"),
            *("--engine-args", '{"dtype": "bfloat16"}'),
        ],
        env=environment(playground),
        cwd=playground.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    states = json.loads(done.stdout)["rank_states"]
    assert [Path(state).name for state in states] == ["rank_0", "rank_1"]
    extra = ours(model="ranked", rank_state="require", store="off")
    bare = playground.bare("qwen3")
    assert engines.tokens(bare, **extra, tensor_parallel_size=2) == expected
    for rank in range(2):
        assert f"/rank_{rank}`, process {rank} of 2 here: 27 tensors, 427552 bytes" in (
            engines.log.read_text()
        )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """vLLM's OpenAI-compatible server, started as a user would; its own program."""

    def __init__(self, playground: Playground, *arguments: str) -> None:
        self.port = free_port()
        self.log = playground.root / f"server-{self.port}.log"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                *("--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"),
                *("--dtype", "bfloat16", "--max-model-len", "128", "--max-num-seqs", "4"),
                *("--load-format", "sllm", "--served-model-name", "tiny", *arguments),
            ],
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment(playground),
            cwd=playground.root,
        )

    def wait(self) -> bool:
        """Whether it serves; else it has ended."""
        deadline = time.monotonic() + SERVER_DEADLINE_S
        while self._process.poll() is None:
            try:
                self.get("/v1/models")
            except OSError:
                assert time.monotonic() < deadline, self.log.read_text()[-4000:]
                time.sleep(0.5)
            else:
                return True
        return False

    def get(self, path: str, document: Any = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if document is None else json.dumps(document).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def end(self) -> int:
        self._process.terminate()
        return self._process.wait(60)


def test_a_server_answers_as_the_guide_shows(
    engines: Engines, playground: Playground, store: RunningStore
) -> None:
    from openai import OpenAI

    from tests.engines.vllm_engine import PROMPTS

    expected = engines.tokens(playground.source("qwen3"))
    shutil.copytree(playground.converted("qwen3"), playground.storage / "org" / "served")
    server = Server(playground, "--model", "./models/org/served")
    try:
        assert server.wait(), server.log.read_text()[-4000:]
        assert [model["id"] for model in server.get("/v1/models")["data"]] == ["tiny"]
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            answer = server.get(
                "/v1/completions",
                {
                    "model": "tiny",
                    "prompt": prompt,
                    "max_tokens": 16,
                    "temperature": 0,
                    "ignore_eos": True,
                    "return_token_ids": True,
                },
            )
            assert answer["choices"][0]["token_ids"] == tokens
        messages = [{"role": "user", "content": "Hello"}]
        chat = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
        by_hand = server.get("/v1/chat/completions", chat)["choices"][0]["message"]["content"]
        assert by_hand
        client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        by_client = client.chat.completions.create(**chat)
        assert by_client.choices[0].message.content == by_hand
        assert "org/served" in [model["name"] for model in store.status()["models"]]
    finally:
        server.end()


def test_a_server_without_a_weight_never_serves(playground: Playground) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    model = playground.variant("served-without-q", "qwen3", without=name)
    server = Server(playground, "--model", f"./models/{model}")
    try:
        assert not server.wait()
    finally:
        code = server.end()
    assert code != 0
    assert f"it has no `{name}`" in server.log.read_text()

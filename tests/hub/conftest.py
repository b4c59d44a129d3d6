"""Hubs, caches and an environment of their own for each test."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import MIB, HubServer, ProxyServer, content


@pytest.fixture
def hugging_face():
    with HubServer() as server:
        yield server


@pytest.fixture
def modelscope():
    with HubServer() as server:
        yield server


@pytest.fixture
def proxy():
    with ProxyServer() as server:
        yield server


@pytest.fixture
def model() -> dict[str, bytes]:
    """A repository with two sharded weight files and what usually lies beside them."""
    shards = {f"model-0000{i}-of-00002.safetensors": content(6 * MIB, i) for i in (1, 2)}
    index = {"weight_map": {f"layer.{i}": shard for i, shard in enumerate(shards)}}
    return {
        **shards,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": b'{"model_type": "tiny"}',
        "tokenizer/vocab.json": b"{}",
        "pytorch_model.bin": content(5 * MIB, 3),
        "consolidated.safetensors": content(5 * MIB, 4),
        "original/params.json": b"{}",
        "README.md": b"# Tiny\n",
    }


@pytest.fixture
def wanted() -> list[str]:
    """Those of the model's files that a checkpoint needs."""
    return [
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer/vocab.json",
    ]


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch, hugging_face, modelscope):
    """Nothing of the machine's own settings; both clients speak to the test's servers."""
    for variable in list(os.environ):
        if variable.upper().startswith(
            ("HF_", "HUGGING", "MODELSCOPE", "TRANSFORMERS", "VLLM", "SLLMCTL")
        ):
            monkeypatch.delenv(variable)
        if variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    settings = {
        "HOME": tmp_path / "home",
        "HF_HOME": tmp_path / "hf",
        "HF_ENDPOINT": hugging_face.url,
        "MODELSCOPE_CACHE": tmp_path / "ms",
        "MODELSCOPE_HOME": tmp_path / "ms-home",
        "MODELSCOPE_ENDPOINT": modelscope.url,
        # The client waits between attempts; a refused connection is refused the second time too.
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
    }
    for variable, value in settings.items():
        monkeypatch.setenv(variable, str(value))


@pytest.fixture
def dead_url() -> str:
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"

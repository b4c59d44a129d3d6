"""vLLM's own model code, filled by our loader: the same bits as with vLLM's, or a refusal.

A model is built and filled in a rank that has no scheduler around it: see ``vllm_worker``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import Playground
from tests.engines.models import PLAIN, QUANTIZED

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: see `make test-engines`", allow_module_level=True)

Answer = dict[str, Any]
WORKER = Path(__file__).with_name("vllm_worker.py")


class Workers:
    """The ranks of a tensor-parallel vLLM, which do every job together."""

    def __init__(self, ranks: int, directory: Path) -> None:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLLMCTL_")},
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(directory / "hf"),
            "SLLMCTL_SOCKET": str(directory / "store.sock"),
            "SLLMCTL_STORAGE_PATH": str(directory / "models"),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.logs = [directory / f"rank{rank}of{ranks}.log" for rank in range(ranks)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(rank), str(ranks), str(directory / f"r{ranks}")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("w"),
                env=environment,
                text=True,
            )
            for rank, log in enumerate(self.logs)
        ]

    def run(self, model: Path | str, **job: Any) -> list[Answer]:
        line = json.dumps({"model": str(model), **job}) + "\n"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        answers = []
        for process, log in zip(self._processes, self.logs, strict=True):
            assert process.stdout is not None
            answer = process.stdout.readline()
            assert answer, log.read_text()[-4000:]
            answers.append(json.loads(answer))
        return answers

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(60)


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def workers(request: pytest.FixtureRequest, playground: Playground) -> Iterator[Workers]:
    running = Workers(request.param, playground.root)
    yield running
    running.end()


def ours(**extra: Any) -> dict[str, Any]:
    return {"load_format": "sllm", "model_loader_extra_config": extra}


def errors(answers: list[Answer]) -> str:
    return " ".join(answer.get("error", "no error") for answer in answers)


@pytest.mark.parametrize("name", [*PLAIN, *QUANTIZED])
def test_every_tensor_is_as_vllm_loads_it(
    workers: Workers, playground: Playground, name: str
) -> None:
    expected = workers.run(playground.source(name))
    assert "error" not in expected[0], expected
    playground.converted(name)
    assert workers.run(playground.bare(name), **ours(model=name)) == expected


def test_experts_of_other_ranks_are_left_out(workers: Workers, playground: Playground) -> None:
    parallel = {"enable_expert_parallel": True, "enable_ep_weight_filter": True}
    expected = workers.run(playground.source("qwen3-moe"), **parallel)
    playground.converted("qwen3-moe")
    loaded = workers.run(playground.bare("qwen3-moe"), **ours(model="qwen3-moe"), **parallel)
    assert loaded == expected
    assert len(expected) == 1 or expected[0]["tensors"] != expected[1]["tensors"]


def test_weights_are_reloaded_in_place(workers: Workers, playground: Playground) -> None:
    playground.converted("qwen3")
    for answer in workers.run(playground.bare("qwen3"), **ours(model="qwen3"), reload=""):
        assert answer["reloaded"] == answer["tensors"], answer

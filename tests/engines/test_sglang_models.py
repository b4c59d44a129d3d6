"""SGLang's own model code, filled by our loader: the same bits as with SGLang's, or a refusal.

A model is built and filled in ranks that have no scheduler around them: see ``sglang_worker``.
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
from tests.engines.models import PLAIN

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed: see `make test-engines`", allow_module_level=True)

Answer = dict[str, Any]
WORKER = Path(__file__).with_name("sglang_worker.py")


class Worker:
    """A process that has imported SGLang, and forks the ranks of each job."""

    def __init__(self, directory: Path) -> None:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLLMCTL_")},
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(directory / "hf"),
            "SLLMCTL_SOCKET": str(directory / "store.sock"),
            "SLLMCTL_STORAGE_PATH": str(directory / "models"),
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        }
        self.log = directory / "sglang.log"
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=environment,
            text=True,
        )

    def run(self, model: Path | str, ranks: int = 1, **job: Any) -> list[Answer]:
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"model_path": str(model), "tp_size": ranks, **job}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.log.read_text()[-4000:]
        return list(json.loads(answer))

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def worker(playground: Playground) -> Iterator[Worker]:
    running = Worker(playground.root)
    yield running
    running.end()


def ours(**extra: Any) -> dict[str, Any]:
    return {"model_loader_extra_config": json.dumps({"sllm": extra})}


def tensors(answers: list[Answer]) -> list[dict[str, str]]:
    assert all("tensors" in answer for answer in answers), answers
    return [answer["tensors"] for answer in answers]


def errors(answers: list[Answer]) -> str:
    return " ".join(answer.get("error", "no error") for answer in answers)


@pytest.mark.parametrize("ranks", [1, 2], ids=["tp1", "tp2"])
@pytest.mark.parametrize("name", PLAIN)
def test_every_tensor_is_as_sglang_loads_it(
    worker: Worker, playground: Playground, name: str, ranks: int
) -> None:
    expected = worker.run(playground.source(name), ranks)
    playground.converted(name)
    loaded = worker.run(playground.bare(name), ranks, **ours(model=name))
    assert tensors(loaded) == tensors(expected)
    assert {answer["loader"] for answer in loaded} == {"SllmLoader"}
    assert {answer["loader"] for answer in expected} == {"DefaultModelLoader"}


def test_the_class_is_a_load_format_too(worker: Worker, playground: Playground) -> None:
    playground.converted("qwen3")
    loaded = worker.run(playground.bare("qwen3"), **ours(model="qwen3"), by_class=True)
    assert tensors(loaded) == tensors(worker.run(playground.source("qwen3")))


def test_a_missing_tensor_is_refused_by_name(worker: Worker, playground: Playground) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    model = playground.variant("sglang-no-down", "qwen3", without=name)
    told = errors(worker.run(playground.bare("qwen3"), **ours(model=model)))
    assert f"`{model}` does not fill a Qwen3ForCausalLM: `{name}` got 0 of " in told
    assert f"it has no `{name}`" in told


def test_a_missing_part_of_a_fused_parameter_is_refused_by_name_and_bytes(
    worker: Worker, playground: Playground
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    model = playground.variant("sglang-no-q", "qwen3", without=name)
    told = errors(worker.run(playground.bare("qwen3"), **ours(model=model)))
    whole = 256 * 128 * 2  # q has half of the rows of qkv
    assert f"`model.layers.0.self_attn.qkv_proj.weight` got {whole // 2} of {whole} bytes" in told
    assert f"it has no `{name}`" in told


def test_a_flipped_bit_is_refused_when_bytes_are_compared(
    worker: Worker, playground: Playground
) -> None:
    model = playground.damaged("sglang-flipped", "qwen3")
    told = errors(worker.run(playground.bare("qwen3"), **ours(model=model, verify=True)))
    assert "ChecksumMismatch" in told and "model.safetensors" in told


def test_a_store_that_is_required_and_not_there_is_an_error(
    worker: Worker, playground: Playground
) -> None:
    playground.converted("qwen3")
    told = errors(worker.run(playground.bare("qwen3"), **ours(model="qwen3", store="require")))
    assert "StoreUnreachable" in told and "store.sock" in told


def test_an_option_that_is_not_there_is_refused(worker: Worker, playground: Playground) -> None:
    told = errors(worker.run(playground.bare("qwen3"), **ours(modle="qwen3")))
    assert "`modle`" in told and "did you mean `model`?" in told
    told = errors(worker.run(playground.bare("qwen3"), **ours(model="qwen3", rank_state="auto")))
    assert "a rank state is what vLLM's workers write" in told


def test_without_our_key_sglang_loads_as_ever(worker: Worker, playground: Playground) -> None:
    told = errors(worker.run(playground.bare("qwen3")))
    assert "Cannot find any model weights" in told


def test_a_hook_that_cannot_be_set_refuses_our_key_instead_of_loading_past_us(
    tmp_path: Path,
) -> None:
    code = (
        "from sglang.srt.model_loader import loader\n"
        "del loader.get_model_loader  # as a version that calls it otherwise\n"
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "from sglang.srt.configs.load_config import LoadConfig\n"
        "LoadConfig()\n"
        "LoadConfig(model_loader_extra_config={'num_threads': 2})\n"
        "for extra in ({'sllm': {}}, '{\"sllm\": {}}'):\n"
        "    try:\n"
        "        LoadConfig(model_loader_extra_config=extra)\n"
        "    except RuntimeError as exc:\n"
        "        assert 'get_model_loader' in str(exc), exc\n"
        "    else:\n"
        "        raise SystemExit('loads past us')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)


def test_a_version_that_does_not_tell_of_its_machines_is_on_one(tmp_path: Path) -> None:
    code = (
        "import sys, types\n"
        "from sglang.srt import server_args\n"
        "from sllmctl.integrations.sglang_loader import _nodes\n"
        "sys.modules['sglang.srt.runtime_context'] = None  # as 0.5.3\n"
        "server_args.get_global_server_args = lambda: types.SimpleNamespace(nnodes=2)\n"
        "assert _nodes() == 2\n"
        "del server_args.get_global_server_args\n"
        "assert _nodes() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)

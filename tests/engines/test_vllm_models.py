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
import torch

from sllmctl.core.write.convert import convert
from tests.engines.conftest import Playground
from tests.engines.models import PLAIN, QUANTIZED, read_tensors, write_like

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: see `make test-engines`", allow_module_level=True)

Answer = dict[str, Any]
WORKER = Path(__file__).with_name("vllm_worker.py")


class Workers:
    """The ranks of a tensor-parallel vLLM, which do every job together."""

    def __init__(self, ranks: int, directory: Path) -> None:
        self._shared = f"sllm-tests-{os.getpid()}-{ranks}"  # names the ranks' shared memory
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLLMCTL_")},
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(directory / "hf"),
            "SLLMCTL_SOCKET": str(directory / "store.sock"),
            "SLLMCTL_STORAGE_PATH": str(directory / "models"),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_DIST_IDENT": self._shared,
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
        for left in Path("/dev/shm").glob(f"{self._shared}*"):
            left.unlink()


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


def test_each_stage_of_a_pipeline_takes_its_layers(
    workers: Workers, playground: Playground
) -> None:
    stages = len(workers.logs)
    expected = workers.run(playground.source("llama"), stages=stages)
    playground.variant(f"staged-{stages}", "llama")
    for use in ("auto", "require"):
        extra = ours(model=f"staged-{stages}", rank_state=use)
        assert workers.run(playground.bare("llama"), **extra, stages=stages) == expected
    assert stages == 1 or expected[0]["tensors"].keys() != expected[1]["tensors"].keys()


def test_weights_are_reloaded_in_place(workers: Workers, playground: Playground) -> None:
    playground.converted("qwen3")
    for answer in workers.run(playground.bare("qwen3"), **ours(model="qwen3"), reload=""):
        assert answer["reloaded"] == answer["tensors"], answer


def test_a_missing_tensor_is_refused_by_name(workers: Workers, playground: Playground) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    model = playground.variant(f"no-down-{len(workers.logs)}", "qwen3", without=name)
    told = errors(workers.run(playground.bare("qwen3"), **ours(model=model)))
    assert told.count(f"`{model}` does not fill a Qwen3ForCausalLM: `{name}` got 0 of ") == len(
        workers.logs
    )
    assert f"it has no `{name}`" in told


def test_a_missing_part_of_a_fused_parameter_is_refused_by_name_and_bytes(
    workers: Workers, playground: Playground
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    model = playground.variant(f"no-q-{len(workers.logs)}", "qwen3", without=name)
    told = errors(workers.run(playground.bare("qwen3"), **ours(model=model)))
    # q has half of the rows of qkv; bf16, 128 columns, 256 rows in all.
    whole = 256 * 128 * 2 // len(workers.logs)
    assert f"`model.layers.0.self_attn.qkv_proj.weight` got {whole // 2} of {whole} bytes" in told
    assert f"it has no `{name}`" in told
    allowed = workers.run(playground.bare("qwen3"), **ours(model=model, check="names"))
    assert "error" not in allowed[0]


def test_a_missing_expert_is_refused(workers: Workers, playground: Playground) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    model = playground.variant(f"no-expert-{len(workers.logs)}", "qwen3-moe", without=name)
    told = errors(workers.run(playground.bare("qwen3-moe"), **ours(model=model)))
    assert "w13_weight` got " in told
    assert f"`{name}`" in told


def test_a_missing_scale_of_a_quantized_weight_is_refused(
    workers: Workers, playground: Playground
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    model = playground.variant(f"no-scale-{len(workers.logs)}", "qwen3-int8", without=name)
    told = errors(workers.run(playground.bare("qwen3-int8"), **ours(model=model)))
    assert f"`{name}` got 0 of " in told


def test_a_flipped_bit_is_found_before_anything_is_built(
    workers: Workers, playground: Playground
) -> None:
    model = playground.damaged(f"damaged-{len(workers.logs)}", "qwen3")
    told = errors(workers.run(playground.bare("qwen3"), **ours(model=model, verify=True)))
    assert "ChecksumMismatch: " in told
    assert "model.safetensors` is damaged between bytes 0 and " in told


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"model": "qwen3", "store": "require"}, "StoreUnreachable: no store answers at"),
        ({"model": "llama"}, "holds a LlamaForCausalLM, and"),
        ({"model": "nowhere"}, "CheckpointNotFound: there is no checkpoint `nowhere`"),
        ({"modle": "qwen3"}, "has no option `modle` (did you mean `model`?)"),
        ({}, "CheckpointNotFound: no checkpoint in"),
    ],
)
def test_what_cannot_succeed_is_refused_with_the_reason(
    workers: Workers, playground: Playground, extra: dict[str, Any], words: str
) -> None:
    playground.converted("qwen3"), playground.converted("llama")
    answers = workers.run(playground.bare("qwen3"), **ours(**extra))
    assert errors(answers).count(words) == len(answers), errors(answers)


def test_a_draft_model_gets_its_own_weights(workers: Workers, playground: Playground) -> None:
    playground.converted("qwen3")
    draft = playground.source("llama")
    expected = workers.run(draft)
    answers = workers.run(playground.bare("qwen3"), **ours(model="qwen3"), draft=str(draft))
    assert [answer["draft"] for answer in answers] == [answer["tensors"] for answer in expected]


@pytest.mark.parametrize("name", [*PLAIN, *QUANTIZED])
def test_a_rank_state_is_written_once_and_gives_the_same_bits(
    workers: Workers, playground: Playground, name: str
) -> None:
    bare = playground.bare(name)
    expected = workers.run(playground.source(name))
    path = playground.converted(name)
    assert workers.run(bare, **ours(model=name, rank_state="auto", verify=True)) == expected
    sizes = {file: file.stat().st_mtime_ns for file in path.glob("rank_state/*/*/*.safetensors")}
    ranks = len(workers.logs)
    # Tensor parallel with one rank and with two are two states.
    assert len(sizes) in (1, 2, 3) and len(sizes) >= ranks
    assert workers.run(bare, **ours(model=name, rank_state="require")) == expected
    assert workers.run(bare, **ours(model=name, rank_state="auto", verify=True)) == expected
    assert sizes == {file: file.stat().st_mtime_ns for file in sizes}
    assert f"{name}/rank_state/" in workers.logs[0].read_text().rpartition("sllm: `")[2]
    refused = errors(workers.run(bare, **ours(model=name, rank_state="require"), dtype="float16"))
    assert "fits rank 0: " in refused and "dtype is bfloat16 there and float16 here" in refused


def test_a_draft_that_notes_what_it_was_given_is_loaded_anew_each_time(
    workers: Workers, playground: Playground
) -> None:
    llama = playground.source("llama")
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in read_tensors(llama).items()
        if (name.startswith("model.layers.0.") and "input_layernorm" not in name)
        or "embed_tokens" in name
    }
    hidden = tensors["embed_tokens.weight"].shape[1]
    tensors["fc.weight"] = torch.ones(hidden, 2 * hidden, dtype=torch.bfloat16)
    name = f"eagle-{len(workers.logs)}"
    source = write_like(llama, playground.root / "sources" / name, tensors, num_hidden_layers=1)
    eagle = convert(source, playground.storage / name, verify=False).path
    speculative = {"method": "eagle", "num_speculative_tokens": 2}
    expected = workers.run(llama, speculative_config={**speculative, "model": str(source)})
    assert "error" not in expected[0], expected
    # It found embeddings of its own: a state would give them to it, and leave that unsaid.
    assert all(answer["has_own_embeddings"] for answer in expected)
    playground.variant(f"target-{name}", "llama")
    for _ in range(2):
        extra = ours(model={str(llama): f"target-{name}"}, rank_state="auto")
        drafting = {**speculative, "model": str(eagle)}
        assert workers.run(llama, **extra, speculative_config=drafting) == expected
    assert not (eagle / "rank_state").exists()
    assert (playground.storage / f"target-{name}" / "rank_state").exists()
    assert "the load sets `has_own_embed_tokens`" in workers.logs[0].read_text()


def test_a_damaged_rank_state_is_refused(workers: Workers, playground: Playground) -> None:
    name = f"state-{len(workers.logs)}"
    playground.variant(name, "opt")
    workers.run(playground.bare("opt"), **ours(model=name, rank_state="auto", verify=True))
    shards = sorted((playground.storage / name).glob("rank_state/*/rank_*/model.safetensors"))
    assert len(shards) == len(workers.logs)
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-3] ^= 1
        shard.write_bytes(content)
    extra = ours(model=name, rank_state="require", verify=True)
    told = errors(workers.run(playground.bare("opt"), **extra))
    assert told.count("ChecksumMismatch") == len(workers.logs)

"""A process that writes rank state: its lines, its silence, its end. vLLM takes no part."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.errors import CheckpointError
from sllmctl.integrations import vllm_rank
from sllmctl.integrations.engine_rank import RankKey
from sllmctl.integrations.engine_source import FoundModel
from tests.conftest import write_checkpoint

Engine = Callable[[str], None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", {"model.safetensors": {"a": torch.ones(3)}})


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Have Python run a script in the place of the module that starts vLLM."""

    def put(script: str) -> None:
        path = tmp_path / "engine.py"
        path.write_text(script)
        program = tmp_path / "python"
        program.write_text(
            f'#!/bin/sh\necho $$ > {tmp_path}/pid\nexec {sys.executable} {path} "$3"\n'
        )
        program.chmod(0o755)
        monkeypatch.setattr(vllm_rank.sys, "executable", str(program))
        monkeypatch.setattr(vllm_rank, "require_vllm", lambda: None)

    return put


STATES = """
import json, pathlib, sys
arguments = json.loads(sys.argv[1])
for rank in range({ranks}):
    path = pathlib.Path(arguments["model"]) / "rank_state" / "f" / f"rank_{{rank}}"
    path.mkdir(parents=True)
    (path / "rank_state.json").write_text("{{}}")
    print(f"(Worker {{rank}}) sllm rank state: {{path}}")
print("no newline at the end", end="")
"""


def test_what_the_ranks_announce_is_what_was_written(checkpoint: Path, engine: Engine) -> None:
    engine(STATES.format(ranks=2))
    states = vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=2)
    assert states == [checkpoint / "rank_state" / "f" / f"rank_{rank}" for rank in range(2)]
    assert vllm_rank.describe_states(states) == "rank state for vLLM: 2 ranks, 0 B"


def test_the_ranks_are_heard_whatever_the_user_does_with_his_log(
    checkpoint: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LEVEL", "WARNING"), ("STREAM", "/dev/null"), ("CONFIG_PATH", "/x.json")):
        monkeypatch.setenv(f"VLLM_LOGGING_{name}", value)
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")
    quiet = """
import os
assert os.environ["VLLM_CONFIGURE_LOGGING"] == "1", "no log"
assert not {f"VLLM_LOGGING_{n}" for n in ("LEVEL", "STREAM", "CONFIG_PATH")} & {*os.environ}, "log"
"""
    engine(quiet + STATES.format(ranks=1))
    assert len(vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=1)) == 1


def test_a_state_is_as_verified_as_its_checkpoint(checkpoint: Path, engine: Engine) -> None:
    engine(STATES.format(ranks=1))
    for verified in (False, True):
        (state,) = vllm_rank.write_rank_states(
            checkpoint, tensor_parallel_size=1, verified=verified
        )
        assert (state / "verified").exists() == verified
        shutil.rmtree(state)


def test_a_state_of_a_checkpoint_that_was_written_to_meanwhile_is_not_verified(
    checkpoint: Path, engine: Engine
) -> None:
    touch = "import os\nos.utime(pathlib.Path(arguments['model'], 'model.safetensors'), ns=(5, 5))"
    engine(STATES.format(ranks=1) + touch)
    (state,) = vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=1, verified=True)
    assert not (state / "verified").exists()


def test_a_draft_s_own_state_is_none_of_the_model_s(
    checkpoint: Path, engine: Engine, tmp_path: Path
) -> None:
    elsewhere = STATES.replace('arguments["model"]', repr(str(tmp_path / "draft")))
    engine(elsewhere.format(ranks=1) + STATES.format(ranks=1))
    with pytest.raises(CheckpointError, match="1 of 2 ranks"):
        vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=2)


def test_a_rank_that_wrote_nothing_is_missed(checkpoint: Path, engine: Engine) -> None:
    engine(STATES.format(ranks=1))
    with pytest.raises(CheckpointError, match="1 of 2 ranks") as caught:
        vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=2)
    assert str(caught.value.hint).endswith("no newline at the end")


def test_every_stage_of_a_pipeline_has_its_ranks(checkpoint: Path, engine: Engine) -> None:
    engine(STATES.format(ranks=3))
    arguments = {"pipeline_parallel_size": 2}
    with pytest.raises(CheckpointError, match="3 of 4 ranks"):
        vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=2, engine_args=arguments)


def test_an_engine_that_fails_says_why(checkpoint: Path, engine: Engine) -> None:
    engine("import sys; print('the reason'); sys.exit(3)")
    with pytest.raises(CheckpointError, match="exit code 3") as caught:
        vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=1)
    assert "the reason" in str(caught.value.hint)


def test_an_engine_that_says_nothing_is_ended(
    checkpoint: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine("import time; time.sleep(600)")
    monkeypatch.setattr(vllm_rank, "SILENCE_S", 2.0)
    with pytest.raises(CheckpointError, match="logged nothing for 2 s"):
        vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_lines_are_read_from_a_descriptor_beyond_1023() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 1200:
        pytest.skip("so many descriptors are not allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 1200), limits[1]))
    try:
        with subprocess.Popen([sys.executable, "-c", "print(1)"], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            os.dup2(child.stdout.fileno(), 1100)
            process: Any = SimpleNamespace(stdout=os.fdopen(1100, "rb"))
            with process.stdout:
                assert list(vllm_rank._lines(process, silence_s=60)) == ["1"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


RankOf = Callable[..., RankKey]


@pytest.fixture
def rank_of(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> RankOf:
    """The key of a worker, of whom vLLM would say these sizes, ranks and settings."""

    def put(name: str, **content: Any) -> None:
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    def key(tp: int = 0, pp: int = 0, dp: int = 0, pcp: int = 0, **settings: Any) -> RankKey:
        sizes = {"tp": 2, "pp": 2, "dp": 1, "pcp": 1, **settings.pop("sizes", {})}
        device = settings.pop("device", "card A")
        ranks = {"tp": tp, "pp": pp, "dp": dp, "pcp": pcp}
        groups = {
            f"get_{name}_group": lambda name=name: SimpleNamespace(
                world_size=sizes[name], rank_in_group=ranks[name]
            )
            for name in sizes
        }
        parallel = SimpleNamespace(
            data_parallel_size=sizes["dp"],
            prefill_context_parallel_size=sizes["pcp"],
            **{"enable_expert_parallel": False, **settings},
        )
        config = SimpleNamespace(parallel_config=parallel)
        put("vllm", __version__="1")
        put("vllm.config", get_current_vllm_config=lambda: config)
        put("vllm.distributed", **groups)
        put("vllm.distributed.parallel_state", **groups)
        platform = SimpleNamespace(device_name="npu", get_device_name=lambda: device)
        put("vllm.platforms", current_platform=platform)
        model_config = SimpleNamespace(
            quantization=None, dtype=torch.bfloat16, hf_config=SimpleNamespace(to_dict=dict)
        )
        found = FoundModel(str(checkpoint), checkpoint, open_checkpoint(checkpoint))
        return vllm_rank.rank_key(found, model_config)

    return key


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"dp": 2}, {"pcp": 2}, {"dp": 2, "pcp": 3}])
def test_every_worker_has_a_rank_of_its_own(
    rank_of: RankOf, sizes: dict[str, int], experts: bool
) -> None:
    # Without expert parallelism, too, vLLM cuts experts among all of them.
    keys = [
        rank_of(tp, pp, dp, pcp, sizes=sizes, enable_expert_parallel=experts)
        for dp in range(sizes.get("dp", 1))
        for pcp in range(sizes.get("pcp", 1))
        for pp in range(2)
        for tp in range(2)
    ]
    assert [key.rank for key in keys] == list(range(len(keys)))
    assert len({key.fingerprint for key in keys}) == 1
    assert not sizes or keys[0].fingerprint != rank_of(enable_expert_parallel=experts).fingerprint


def test_experts_that_are_placed_otherwise_are_another_state(rank_of: RankOf) -> None:
    linear, turns = (
        rank_of(enable_expert_parallel=True, expert_placement_strategy=placement)
        for placement in ("linear", "round_robin")
    )
    assert linear.rank == turns.rank
    assert linear.path != turns.path


def test_another_kind_of_card_is_another_state(rank_of: RankOf) -> None:
    # Padding of quantized weights follows the kernels that a card has.
    assert rank_of(device="card A").path != rank_of(device="card B").path

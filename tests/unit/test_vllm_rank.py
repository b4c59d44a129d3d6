"""A process that writes rank state: its lines, its silence, its end. vLLM takes no part."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sllmctl.errors import CheckpointError
from sllmctl.integrations import vllm_rank
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


def test_a_rank_that_wrote_nothing_is_missed(checkpoint: Path, engine: Engine) -> None:
    engine(STATES.format(ranks=1))
    with pytest.raises(CheckpointError, match="1 of 2 ranks") as caught:
        vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=2)
    assert str(caught.value.hint).endswith("no newline at the end")


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
    with pytest.raises(CheckpointError, match="said nothing for 2 s"):
        vllm_rank.write_rank_states(checkpoint, tensor_parallel_size=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)

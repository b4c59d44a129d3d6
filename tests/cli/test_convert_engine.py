"""`sllmctl convert --engine`: what is wrong with it is said before anything is converted."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_nothing_is_converted(
    sllmctl: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = sllmctl("convert", str(tiny_checkpoint), "--output", "out", "--engine", "vllm")
    assert done.returncode == 1
    assert "vLLM is not installed" in done.stderr
    assert "install sllmctl into vLLM's environment" in done.stderr
    assert not list(tmp_path.rglob("out"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"tensor_parallel_size": 2}', "`tensor_parallel_size` is what"),
        ('{"model_loader_extra_config": {}}', "`model_loader_extra_config` is sllmctl's own"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    sllmctl: Run, tiny_checkpoint: Path, text: str, words: str
) -> None:
    done = sllmctl("convert", str(tiny_checkpoint), "--engine", "vllm", "--engine-args", text)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize("option", [("--tensor-parallel-size", "2"), ("--engine-args", "{}")])
def test_what_an_engine_alone_understands_is_refused_without_one(
    sllmctl: Run, tiny_checkpoint: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    done = sllmctl("convert", str(tiny_checkpoint), "--output", "out", *option)
    assert done.returncode == 2
    assert option[0] in done.stderr and "needs --engine" in done.stderr
    assert not list(tmp_path.rglob("out"))

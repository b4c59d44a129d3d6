"""The generated checkpoint is one that transformers runs, of the size that was asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sllmctl.bench.generate import VOCABULARY, Shape, make_qwen3
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.errors import ConfigError

SIZE_BYTES = 80_000_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest one there is, in several shards."""
    directory = tmp_path_factory.mktemp("generated") / "qwen3"
    make_qwen3(directory, SIZE_BYTES, max_shard_bytes=20_000_000)
    return directory


@pytest.mark.parametrize("size_bytes", [SIZE_BYTES, 10**9, 2 * 10**9, 5 * 10**9, 16 * 2**30])
def test_sizes_come_near_to_what_is_asked(size_bytes: int) -> None:
    shape = Shape.of(size_bytes)
    assert shape.nbytes() == pytest.approx(size_bytes, rel=0.06)
    assert VOCABULARY * shape.hidden * 2 <= size_bytes / 2


def test_a_gigabyte_has_the_width_of_a_published_model() -> None:
    assert Shape.of(10**9).hidden == 1024


def test_a_size_below_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small"):
        Shape.of(10_000_000)


def test_transformers_runs_it(path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == VOCABULARY
    prompt = [{"role": "user", "content": "Hello 世界"}]
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = "<|im_start|>user\nHello 世界<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(inputs["input_ids"][0]) == text
    with torch.inference_mode():
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert 0.05 < logits.float().std() < 5
    assert tokenizer.decode(logits[0, -1].argmax()).strip()


def test_its_weights_are_spread_as_trained_ones_and_all_different(path: Path) -> None:
    tensors = {k: t for file in path.glob("*.safetensors") for k, t in load_file(file).items()}
    assert len({tensor.view(torch.int16).numpy().tobytes() for tensor in tensors.values()}) == len(
        tensors
    )
    for name, tensor in tensors.items():
        if "norm" in name:
            assert 1 <= tensor.min() <= tensor.max() < 1.2
        else:
            assert 0.01 < tensor.float().std() < 0.04
            assert tensor.abs().max() < 0.2


def test_shards_hold_what_the_index_says(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.nbytes == Shape.of(SIZE_BYTES).nbytes()
    assert len(checkpoint.shards) > 2
    assert list(checkpoint.tensors) == [name for name, _ in Shape.of(SIZE_BYTES).tensors()]


def test_the_same_arguments_give_the_same_bytes(path: Path, tmp_path: Path) -> None:
    make_qwen3(tmp_path / "again", SIZE_BYTES, max_shard_bytes=20_000_000)
    make_qwen3(tmp_path / "other", SIZE_BYTES, max_shard_bytes=20_000_000, seed=1)
    name = sorted(path.glob("*.safetensors"))[-1].name
    first = (path / name).read_bytes()
    assert (tmp_path / "again" / name).read_bytes() == first
    assert (tmp_path / "other" / name).read_bytes() != first


def test_it_is_written_without_torch_and_in_little_memory(tmp_path: Path) -> None:
    code = (
        "import pathlib, re, sys\n"
        "from sllmctl.bench.generate import main\n"
        "main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "made"), "--size", "250MB"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 < 200 * 10**6


def test_a_wrong_size_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sllmctl.bench.generate import main

    for size in ("1MB", "much"):
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path / "made"), "--size", size])
        assert caught.value.code == 2
        assert "error: " in capsys.readouterr().err

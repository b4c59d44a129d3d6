"""sllm-store's format as the source and as the target of a conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sllmctl import api, convert, load_tensors
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.fileio import Buffer
from sllmctl.core.load import LoadOptions
from sllmctl.core.verify import verify
from sllmctl.core.write import sllm_store_modules
from sllmctl.core.write.convert import ConvertResult
from sllmctl.core.write.convert import convert as convert_directory
from sllmctl.core.write.writer import ZeroBytes
from sllmctl.errors import CheckpointError, CheckpointNotFound, ChecksumMismatch, ConfigError
from tests.conftest import same_bits, some_tensors, write_checkpoint
from tests.convert.conftest import files_of, only_child
from tests.convert.test_killed import RunKilled, run_killed  # noqa: F401 - a fixture
from tests.sllm_store import LOADABLE, golden_tensors, read_sllm_store, write_sllm_store


def loadable_tensors() -> dict[str, torch.Tensor]:
    """Every element type that sllm-store loads, odd sizes, a scalar, an empty one."""
    tensors = {n: t for n, t in some_tensors(0).items() if t.dtype in LOADABLE}
    tensors["int16"] = torch.arange(7, dtype=torch.int16)
    tensors["int32"] = torch.arange(3000, dtype=torch.int32)
    assert {tensor.dtype for tensor in tensors.values()} == set(LOADABLE)
    return tensors


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert not [name for name in want if not same_bits(got[name], want[name])]


def to_sllm_store(source: Path, target: Path, **options: object) -> ConvertResult:
    return convert_directory(source, target, file_format="sllm-store", **options)  # type: ignore[arg-type]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint without a configuration, which nobody has to be asked about."""
    directory = write_checkpoint(tmp_path / "model", {"model.safetensors": loadable_tensors()})
    (directory / "tokenizer.json").write_text("{}")
    return directory


# ---- read --------------------------------------------------------------------------------------


def test_what_sllm_store_wrote_becomes_safetensors(tmp_path: Path) -> None:
    tensors = some_tensors(0) | golden_tensors()
    tensors["rows"] = torch.randn(600, 40).t()
    tensors["large"] = torch.randn(3, 1200, 1300).permute(1, 2, 0)
    tensors["wide"] = torch.arange(5).expand(3, 5)
    source = write_sllm_store(tmp_path / "source", tensors, partition_bytes=8000)
    for name in ("config.json", "tokenizer.json", "no_split_modules.json"):
        (source / name).write_text("{}")
    (source / "tensor.data_9").write_bytes(b"left over")
    result = api.run_conversion(source, tmp_path / "out")
    assert_equal(load_tensors(tmp_path / "out", store="off"), tensors)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format == "safetensors"
    assert checkpoint.aliases == {"head": "embed"}
    assert files_of(tmp_path / "out").keys() == {
        *("config.json", "tokenizer.json", "model.safetensors", "sllmctl.json")
    }
    (warning,) = result.warnings
    assert "`start`" in warning
    assert "part of a larger" in warning
    assert api.run_conversion(source, tmp_path / "out").already


def test_a_cast_takes_strided_tensors_too(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300, 20).t(), "b": torch.randn(5)}
    source = write_sllm_store(tmp_path / "source", tensors)
    convert_directory(source, tmp_path / "out", dtype="bfloat16")
    want = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert_equal(load_tensors(tmp_path / "out", store="off"), want)


def test_an_adapter_becomes_what_peft_reads(tmp_path: Path) -> None:
    tensors = {"base_model.model.q_proj.lora_A.weight": torch.randn(8, 64)}
    source = write_sllm_store(tmp_path / "adapter", tensors)
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert_equal(load_tensors(source, store="off"), tensors)
    path = convert(source, tmp_path / "out")
    assert files_of(path).keys() == {
        *("adapter_config.json", "adapter_model.safetensors", "sllmctl.json")
    }
    assert_equal(load_tensors(path, store="off"), tensors)
    assert verify(path).checked == "digests"
    assert verify(path).ok


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A save of two ranks, with the model's other files beside them."""
    for rank in range(2):
        write_sllm_store(tmp_path / "tp" / f"rank_{rank}", some_tensors(rank))
    (tmp_path / "tp" / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    return tmp_path / "tp"


def test_ranks_are_converted_together(ranks: Path, tmp_path: Path) -> None:
    target = tmp_path / "storage" / "out"
    result = api.run_conversion(ranks, target)
    assert files_of(target).keys() == {
        "config.json",
        *(f"rank_{n}/{f}" for n in (0, 1) for f in ("model.safetensors", "sllmctl.json")),
    }
    for rank in range(2):
        assert_equal(load_tensors(target / f"rank_{rank}", store="off"), some_tensors(rank))
        assert verify(target / f"rank_{rank}").checked == "digests"
    assert result.tensors == 2 * len(some_tensors(0))
    assert "2 ranks" in result.warnings[-1]
    assert only_child(target.parent) == target
    assert api.run_conversion(ranks, target).already
    before = (target / "rank_0").stat().st_ino
    assert not api.run_conversion(ranks, target, force=True).already
    assert (target / "rank_0").stat().st_ino != before


def test_of_ranks_one_that_fails_leaves_nothing(ranks: Path, tmp_path: Path) -> None:
    (ranks / "rank_1" / "tensor.data_0").write_bytes(b"")
    with pytest.raises(CheckpointError, match="`tensor.data_0` is empty"):
        api.run_conversion(ranks, tmp_path / "storage" / "out")
    assert list((tmp_path / "storage").iterdir()) == []


def test_ranks_are_refused_incomplete_cast_or_in_the_way(ranks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not cast"):
        api.run_conversion(ranks, tmp_path / "out", dtype="float16")
    with pytest.raises(ConfigError, match="is inside"):
        api.run_conversion(ranks, ranks / "out")
    (tmp_path / "out" / "rank_0").mkdir(parents=True)
    (tmp_path / "out" / "config.json").touch()
    with pytest.raises(ConfigError, match="there already"):
        api.run_conversion(ranks, tmp_path / "out")
    (ranks / "rank_1").rename(ranks / "rank_2")
    with pytest.raises(CheckpointError, match="has `rank_2` and no `rank_1`"):
        api.run_conversion(ranks, tmp_path / "new")


def test_verify_checks_structure_and_tells_what_it_cannot_know(tmp_path: Path) -> None:
    source = write_sllm_store(tmp_path / "m", golden_tensors())
    report = verify(source)
    assert report.ok
    assert report.checked == "structure"
    assert report.tensors == len(golden_tensors()) - 1
    (warning,) = report.warnings
    assert (warning.kind, warning.tensor) == ("part", "start")
    data = source / "tensor.data_0"
    data.write_bytes(data.read_bytes()[:-8])
    (problem,) = verify(source).problems
    assert problem.kind == "structure"
    assert "truncated" in problem.message
    data.unlink()
    assert not verify(source).ok
    (source / "tensor_index.json").unlink()
    with pytest.raises(CheckpointNotFound):
        verify(source)


def test_damage_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_sllm_store(tmp_path / "m", golden_tensors())
    (source / "tensor.data_0").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        convert(source, tmp_path / "storage" / "out")
    assert not (tmp_path / "storage").exists()


# ---- written -----------------------------------------------------------------------------------


def test_what_is_written_is_read_by_the_rules_of_the_format(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    result = to_sllm_store(model, target, max_shard_bytes=10_000)
    assert_equal(read_sllm_store(target), loadable_tensors())
    assert_equal(load_tensors(target, store="off"), loadable_tensors())
    files = sorted(target.glob("tensor.data_*"))
    assert result.shards == len(files) > 1
    data = b"".join(path.read_bytes() for path in files)
    covered = bytearray(len(data))
    for name, line in json.loads((target / "tensor_index.json").read_text()).items():
        offset, size, *_ = line
        assert offset % 512 == size % 512 == 0, name
        covered[offset : offset + size] = b"\1" * size
    for path in files:
        assert path.stat().st_size % 4096 == 0
        assert path.stat().st_size <= 10_000 or path.stat().st_size == 12_288
    assert not any(byte for byte, used in zip(data, covered, strict=True) if not used)
    assert (target / "tokenizer.json").read_text() == "{}"
    assert to_sllm_store(model, target, max_shard_bytes=10_000).already
    assert not to_sllm_store(model, target, max_shard_bytes=10_000, force=True).already


def test_there_and_back_every_bit_and_tie_is_the_same(tmp_path: Path) -> None:
    tensors = golden_tensors()
    first = write_sllm_store(tmp_path / "first", tensors)
    second = convert(first, tmp_path / "second")
    third = convert(second, tmp_path / "third", format="sllm-store")
    fourth = convert(third, tmp_path / "fourth")
    for path in (second, third, fourth):
        assert_equal(load_tensors(path, store="off"), tensors)
    index = json.loads((third / "tensor_index.json").read_text())
    assert index["head"] == index["embed"]
    assert_equal(read_sllm_store(third), tensors)


def test_padding_is_zero_whatever_the_buffers_held(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((1000 + n,), -1, dtype=torch.int8) for n in range(50)}
    source = write_checkpoint(tmp_path / "m", {"model.safetensors": tensors})
    to_sllm_store(source, tmp_path / "out")
    data = (tmp_path / "out" / "tensor.data_0").read_bytes()
    assert data.count(255) == sum(tensor.numel() for tensor in tensors.values())
    assert data.count(0) == len(data) - data.count(255)
    buffer = Buffer(100)
    buffer.view[:100] = b"\xff" * 100
    ZeroBytes().read_into(0, buffer, 10, 50)
    assert bytes(buffer.view[:100]) == b"\xff" * 10 + bytes(50) + b"\xff" * 40


def test_a_dtype_that_its_loader_refuses_is_refused_before(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", {"model.safetensors": some_tensors(0)})
    with pytest.raises(ConfigError, match="does not load tensors of F8_E4M3") as caught:
        to_sllm_store(source, tmp_path / "storage" / "out")
    assert "--format" in str(caught.value.hint)
    assert not (tmp_path / "storage").exists()


def test_nothing_but_empty_tensors_fills_a_page(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", {"model.safetensors": {"a": torch.empty(0, 4)}})
    to_sllm_store(source, tmp_path / "out")
    assert (tmp_path / "out" / "tensor.data_0").stat().st_size == 4096
    assert load_tensors(tmp_path / "out", store="off")["a"].shape == (0, 4)


@pytest.mark.parametrize("place", ["tensor", "padding", "index", "lost", "cut"])
def test_verify_finds_damage_in_what_was_written(model: Path, tmp_path: Path, place: str) -> None:
    target = tmp_path / "out"
    to_sllm_store(model, target)
    assert verify(target).ok
    assert verify(target).checked == "digests"
    assert verify(target).tensors == len(loadable_tensors())
    data = target / "tensor.data_0"
    content = bytearray(data.read_bytes())
    if place == "lost":
        data.unlink()
    elif place == "cut":
        data.write_bytes(content[:-4096])
    elif place == "index":
        index = target / "tensor_index.json"
        index.write_text(index.read_text() + " ")
    else:
        entry = next(iter(open_checkpoint(target).tensors.values()))
        content[{"tensor": entry.offset, "padding": len(content) - 1}[place]] ^= 4
        data.write_bytes(content)
    problems = verify(target).problems
    kinds = {problem.kind for problem in problems}
    expected = {"lost": {"missing", "structure"}, "cut": {"size", "digest", "structure"}}
    assert kinds <= expected.get(place, {"digest"})
    assert problems
    if place == "tensor":
        assert problems[0].tensor is not None
    if place in ("tensor", "padding"):
        with pytest.raises(ChecksumMismatch):
            api.load(target, store="off", options=LoadOptions(verify=True))


def test_what_was_written_is_loaded_with_its_digests(model: Path, tmp_path: Path) -> None:
    to_sllm_store(model, tmp_path / "out", max_shard_bytes=10_000)
    loaded = api.load(tmp_path / "out", store="off", options=LoadOptions(verify=True))
    assert loaded.stats.verified
    assert_equal(loaded.tensors, loadable_tensors())


def test_killed_at_every_step_it_leaves_nothing_or_all(
    model: Path,
    target: Path,
    run_killed: RunKilled,  # noqa: F811
) -> None:
    at = 1
    seen = set()
    while run_killed(at, model, target, "sllm-store"):
        seen.add(target.exists())
        if target.exists():
            assert verify(target).ok
        to_sllm_store(model, target, max_shard_bytes=10_000)
        assert_equal(read_sllm_store(target), loadable_tensors())
        shutil.rmtree(target.parent)
        at += 3
    assert at > 20
    assert False in seen


def test_ranks_killed_at_any_step_are_not_there_or_all_are(
    ranks: Path,
    target: Path,
    run_killed: RunKilled,  # noqa: F811
) -> None:
    at = 1
    seen = set()
    while run_killed(at, ranks, target, "ranks"):
        seen.add(target.exists())
        assert not target.exists() or verify(target / "rank_1").ok
        api.run_conversion(ranks, target, max_shard_bytes=10_000)
        for rank in range(2):
            assert verify(target / f"rank_{rank}").ok
        assert {path.name for path in target.parent.iterdir()} <= {
            *(target.name, f".{target.name}.partial.lock"),
        }
        shutil.rmtree(target.parent)
        at += 7
    assert at > 50
    assert False in seen


def test_an_old_directory_is_replaced_with_force_alone(model: Path, tmp_path: Path) -> None:
    target = write_sllm_store(tmp_path / "out", golden_tensors())
    with pytest.raises(ConfigError, match="there already"):
        to_sllm_store(model, target)
    to_sllm_store(model, target, force=True)
    assert_equal(read_sllm_store(target), loadable_tensors())


# ---- what transformers is asked ----------------------------------------------------------------


def test_tied_names_and_modules_come_from_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from sllmctl.transformers import load_model
    from tests.models import make_model

    source = make_model("qwen3-tied", tmp_path / "tied")
    written = convert(source, tmp_path / "out", format="sllm-store")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert_equal(read_sllm_store(written), dict(model.state_dict()))
    index = json.loads((written / "tensor_index.json").read_text())
    assert index["lm_head.weight"] == index["model.embed_tokens.weight"]
    sizes = json.loads((written / "no_split_modules.json").read_text())
    whole = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    assert list(sizes) == [*whole, "model.rotary_emb", "lm_head"]
    for name, nbytes in sizes.items():
        parameters = model.get_submodule(name).parameters()
        assert nbytes == sum(p.numel() * p.element_size() for p in parameters), name
    tied = json.loads((written / "tied_no_split_modules.json").read_text())
    assert tied == [[["lm_head", "model.embed_tokens"], sizes["lm_head"]]]
    loaded = load_model(written, device_map="cpu", store="off")
    tokens = torch.arange(8)[None]
    assert same_bits(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "config", [{}, {"architectures": ["NoSuchModel"]}, {"architectures": ["Qwen3ForCausalLM"]}]
)
def test_a_model_that_transformers_cannot_tell_goes_without_its_modules(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, object]
) -> None:
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sllm_store_modules.sys, "executable", "/nonexistent")
    result = to_sllm_store(model, tmp_path / "out")
    assert not (tmp_path / "out" / "no_split_modules.json").exists()
    assert len(result.warnings) == bool(config)
    assert_equal(read_sllm_store(tmp_path / "out"), loadable_tensors())

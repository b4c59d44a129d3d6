"""A loaded adapter is bit for bit the one that PEFT loads; a saved one is PEFT's too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sllmctl
from sllmctl.core.manifest import Origin
from sllmctl.core.verify import verify
from sllmctl.core.write.convert import convert
from sllmctl.errors import CheckpointError, CheckpointNotFound, ConfigError, DeviceUnavailable
from sllmctl.transformers import load_lora, load_model, save_lora, save_model
from tests.integrations.compare import different, loaded, outputs
from tests.models import AUTO_CLASS, same_bits
from tests.store.conftest import RunningStore

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'sllmctl[lora]')")

# What peft does to a newer transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
saves_embeddings = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")

TARGETS = {
    "qwen3": "all-linear",
    "qwen3-moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value"],
    "llava": r".*language_model.*\.(q_proj|up_proj)",
}
Adapter = Callable[..., Path]


@pytest.fixture
def adapter(original: Any, tmp_path: Path) -> Adapter:
    """Write an adapter with random weights as PEFT does."""

    def make(name: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **kw: Any) -> Path:
        model = loaded(original(name), name)
        task = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
        settings = {"target_modules": TARGETS[name], "r": 4, "task_type": task} | kw
        settings["fan_in_fan_out"] = name == "gpt2"
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
                    parameter.data = parameter.data.to(dtype)
        path = tmp_path / f"adapter-{name}-{seed}"
        wrapped.save_pretrained(path)
        return path

    return make


def by_peft(path: Path, model: Any, name: str = "mine", **kw: Any) -> Any:
    return peft.PeftModel.from_pretrained(model, str(path), adapter_name=name, **kw)


def assert_same(mine: Any, other: Any) -> None:
    assert type(mine) is type(other)
    assert not mine.training
    assert different(dict(mine.named_parameters()), dict(other.named_parameters())) == set()
    assert {n: p.requires_grad for n, p in mine.named_parameters()} == {
        n: p.requires_grad for n, p in other.named_parameters()
    }
    assert mine.peft_config == other.peft_config
    assert same_bits(outputs(mine), outputs(other))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("qwen3", torch.bfloat16), *((name, torch.float32) for name in TARGETS)],
)
def test_an_adapter_is_what_peft_makes_of_it(
    name: str, dtype: torch.dtype, adapter: Adapter, original: Any
) -> None:
    path = adapter(name, dtype=dtype)
    mine = load_lora(loaded(original(name), name), "mine", path)
    assert_same(mine, by_peft(path, loaded(original(name), name)))
    assert not same_bits(outputs(mine), outputs(loaded(original(name), name)))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 16},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"rank_pattern": {"q_proj": 8}, "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
@saves_embeddings
def test_kinds_of_lora(settings: dict[str, Any], adapter: Adapter, original: Any) -> None:
    path = adapter("qwen3", dtype=torch.float32, **settings)
    mine = load_lora(loaded(original("qwen3"), "qwen3"), "mine", path)
    assert_same(mine, by_peft(path, loaded(original("qwen3"), "qwen3")))


def test_several_adapters_take_turns(adapter: Adapter, original: Any) -> None:
    paths = {f"a{seed}": adapter("qwen3", seed=seed) for seed in range(2)}
    mine = loaded(original("qwen3"), "qwen3")
    for name, path in paths.items():
        mine = load_lora(mine, name, path)
    assert list(mine.peft_config) == list(paths)
    said = {}
    for name, path in paths.items():
        mine.set_adapter(name)
        said[name] = outputs(mine)
        assert same_bits(said[name], outputs(by_peft(path, loaded(original("qwen3"), "qwen3"))))
    assert not same_bits(said["a0"], said["a1"])
    with mine.disable_adapter():
        assert same_bits(outputs(mine), outputs(loaded(original("qwen3"), "qwen3")))


def test_a_dtype_is_that_of_the_adapter(adapter: Adapter, original: Any) -> None:
    path = adapter("qwen3", dtype=torch.float32)
    mine = load_lora(loaded(original("qwen3"), "qwen3"), "mine", path, torch_dtype=torch.bfloat16)
    own = [p for n, p in mine.named_parameters() if ".mine." in n]
    assert {p.dtype for p in own} == {torch.bfloat16}
    other = by_peft(path, loaded(original("qwen3"), "qwen3"), autocast_adapter_dtype=False)
    assert_same(mine, other)


def test_a_trainable_adapter_gets_gradients(adapter: Adapter, original: Any) -> None:
    path = adapter("qwen3")
    mine = load_lora(loaded(original("qwen3"), "qwen3"), "mine", path, is_trainable=True)
    trained = {n for n, p in mine.named_parameters() if p.requires_grad}
    assert trained and all(".mine." in name for name in trained)
    other = by_peft(path, loaded(original("qwen3"), "qwen3"), is_trainable=True)
    assert trained == {n for n, p in other.named_parameters() if p.requires_grad}


def test_a_name_is_found_below_the_storage_path(adapter: Adapter, original: Any) -> None:
    path = adapter("qwen3")
    mine = load_lora(
        loaded(original("qwen3"), "qwen3"), "mine", path.name, storage_path=path.parent
    )
    assert "mine" in mine.peft_config


def test_an_adapter_comes_from_the_store(
    adapter: Adapter, original: Any, store: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter("qwen3"), store.storage / "me" / "lora")
    monkeypatch.setenv("SLLMCTL_SOCKET", str(store.socket))
    sllmctl.warm("me/lora")
    model = loaded(original("qwen3"), "qwen3", store="off")
    mine = load_lora(model, "mine", "me/lora", storage_path=store.storage, store="require")
    other = by_peft(store.storage / "me" / "lora", loaded(original("qwen3"), "qwen3", store="off"))
    assert_same(mine, other)


@pytest.mark.parametrize("file_format", ["safetensors", "sllm-store"])
def test_a_converted_adapter_loads(
    file_format: Any, adapter: Adapter, original: Any, tmp_path: Path
) -> None:
    source, path = adapter("qwen3"), tmp_path / "converted"
    convert(source, path, file_format=file_format, origin=Origin())
    mine = load_lora(loaded(original("qwen3"), "qwen3"), "mine", path)
    assert_same(mine, by_peft(source, loaded(original("qwen3"), "qwen3")))


def test_a_merged_adapter_is_part_of_a_saved_model(
    adapter: Adapter, original: Any, tmp_path: Path
) -> None:
    from sllmctl.transformers import save_model

    mine = load_lora(loaded(original("qwen3"), "qwen3"), "mine", adapter("qwen3"))
    with pytest.raises(ConfigError, match="not a transformers model"):
        save_model(mine, tmp_path / "no")
    merged = mine.merge_and_unload()
    save_model(merged, tmp_path / "merged")
    assert same_bits(outputs(load_model(tmp_path / "merged")), outputs(merged))


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_a_saved_adapter_is_that_of_peft(
    adapter_name: str, adapter: Adapter, original: Any, tmp_path: Path
) -> None:
    source = adapter("qwen3", dtype=torch.float32)
    model = load_lora(loaded(original("qwen3"), "qwen3"), adapter_name, source)
    path = save_lora(model, tmp_path / "saved")
    theirs = load_file(source / "adapter_model.safetensors")
    assert different(load_file(path / "adapter_model.safetensors"), theirs) == set()
    assert different(sllmctl.load_tensors(path, verify=True), theirs) == set()
    assert not verify(path).problems
    again = by_peft(path, loaded(original("qwen3"), "qwen3"))
    assert same_bits(outputs(again), outputs(model))
    assert json.loads((path / "adapter_config.json").read_text())["inference_mode"] is True


def test_one_of_several_is_saved_in_the_place_of_another(
    adapter: Adapter, original: Any, tmp_path: Path
) -> None:
    first, second = adapter("qwen3", seed=1), adapter("qwen3", seed=2)
    model = load_lora(loaded(original("qwen3"), "qwen3"), "one", first)
    model = load_lora(model, "two", second)
    for name, source in (("one", first), ("two", second)):
        save_lora(model, tmp_path / "saved", adapter_name=name)
        saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        theirs = load_file(source / "adapter_model.safetensors")
        assert different(saved, {n: t.float() for n, t in theirs.items()}) == set()
    with pytest.raises(ConfigError, match="no adapter `three`"):
        save_lora(model, tmp_path / "saved", adapter_name="three")
    with pytest.raises(ConfigError, match="no adapter of its own"):
        save_lora(loaded(original("qwen3"), "qwen3"), tmp_path / "saved")


def test_what_lies_beside_a_replaced_adapter_stays(
    adapter: Adapter, original: Any, tmp_path: Path
) -> None:
    model = load_lora(loaded(original("qwen3"), "qwen3"), "mine", adapter("qwen3"))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "tokenizer_config.json").write_text("{}")  # as trainers save it ahead of the adapter
    for _ in range(2):
        save_lora(model, saved)
        assert (saved / "tokenizer_config.json").read_text() == "{}"
        assert not verify(saved).problems


def test_neither_a_model_nor_an_adapter_takes_the_others_place(
    adapter: Adapter, original: Any, tmp_path: Path
) -> None:
    model = load_lora(loaded(original("qwen3"), "qwen3"), "mine", adapter("qwen3"))
    place = Path(shutil.copytree(original("qwen3"), tmp_path / "model"))
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    with pytest.raises(ConfigError, match="holds a model, and no adapter"):
        save_lora(model, place)
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    (place / "config.json").unlink()
    with pytest.raises(ConfigError, match="holds a model, and no adapter"):
        save_lora(model, place)
    with pytest.raises(ConfigError, match="holds an adapter, and no model"):
        save_model(loaded(original("qwen3"), "qwen3"), adapter("qwen3"))


@pytest.fixture
def edited(adapter: Adapter) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]:
    """Write an adapter again with other tensors."""

    def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        path = adapter("qwen3")
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        return path

    return edit


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
MISFITS = {
    "missing: .*layers.1.self_attn.q_proj.lora_A": lambda tensors: tensors.pop(KEY),
    "unexpected: .*layers.7": lambda tensors: tensors.update(
        {KEY.replace(".1.", ".7."): torch.zeros(4, 128)}
    ),
    r"of another shape: .*q_proj.lora_A.* is \[5, 128\] instead of \[4, 128\]": lambda tensors: (
        tensors.update({KEY: torch.zeros(5, 128)})
    ),
}


@pytest.mark.parametrize(("message", "others"), list(zip(MISFITS, [0, 1, 0], strict=True)))
def test_weights_that_do_not_fit_leave_the_model_as_it_was(
    message: str, others: int, edited: Any, original: Any, adapter: Adapter
) -> None:
    path = edited(MISFITS[message])
    model = loaded(original("qwen3"), "qwen3")
    if others:
        model = load_lora(model, "other", adapter("qwen3", seed=5))
    before, names = outputs(model), list(dict(model.named_parameters()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_lora(model, "mine", path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert list(dict(model.named_parameters())) == names
    assert same_bits(outputs(model), before)
    assert not others or list(model.peft_config) == ["other"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied"])
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"modules_to_save": ["lm_head"]}, "missing: `base_model.model.lm_head.weight`"),
        ({"target_modules": ["q_proj", "norm"]}, "does not suit a Qwen3ForCausalLM: .*RMSNorm"),
    ],
)
def test_an_adapter_that_fails_leaves_nothing_in_the_model(
    name: str, settings: Any, error: str, adapter: Adapter, original: Any
) -> None:
    path = adapter("qwen3")
    document = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(document | settings))
    model = loaded(original(name), name)
    attributes = set(vars(model))
    before = {key: (id(p), p.requires_grad) for key, p in model.named_parameters()}
    with pytest.raises((CheckpointError, ConfigError), match=error):
        load_lora(model, "mine", path)
    assert set(vars(model)) == attributes
    assert {key: (id(p), p.requires_grad) for key, p in model.named_parameters()} == before


@pytest.mark.parametrize("others", [0, 1])
def test_an_interrupt_half_way_leaves_nothing_in_the_model(
    others: int, adapter: Adapter, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    model = loaded(original("qwen3"), "qwen3")
    if others:
        model = load_lora(model, "one", adapter("qwen3"))
    before = {key: (id(p), p.requires_grad) for key, p in model.named_parameters()}
    replace, layers = LoraModel._create_and_replace, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        replace(self, *args, **kwargs)
        layers.append(args)
        if len(layers) == 3:
            raise KeyboardInterrupt

    path = adapter("qwen3", seed=1)
    monkeypatch.setattr(LoraModel, "_create_and_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_lora(model, "two", path)
    assert {key: (id(p), p.requires_grad) for key, p in model.named_parameters()} == before
    monkeypatch.undo()
    assert "two" in load_lora(model, "two", path).peft_config


def test_a_further_adapter_that_fails_half_way_may_be_loaded_again(
    adapter: Adapter, original: Any
) -> None:
    path = adapter("qwen3", seed=1)
    model = load_lora(loaded(original("qwen3"), "qwen3"), "one", adapter("qwen3"))
    before = {key: (id(p), p.requires_grad) for key, p in model.named_parameters()}
    good = (path / "adapter_config.json").read_text()
    bad = json.loads(good) | {"target_modules": ["q_proj", "norm"]}
    (path / "adapter_config.json").write_text(json.dumps(bad))
    with pytest.raises(ConfigError, match="does not suit"):
        load_lora(model, "two", path)
    assert {key: (id(p), p.requires_grad) for key, p in model.named_parameters()} == before
    (path / "adapter_config.json").write_text(good)
    assert list(load_lora(model, "two", path).peft_config) == ["one", "two"]


def test_what_is_no_adapter_is_refused(adapter: Adapter, original: Any, tmp_path: Path) -> None:
    model = loaded(original("qwen3"), "qwen3")
    with pytest.raises(CheckpointNotFound, match="nowhere"):
        load_lora(model, "mine", tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFound, match="no adapter_config"):
        load_lora(model, "mine", original("qwen3"))
    path = adapter("qwen3")
    (path / "adapter_model.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointNotFound, match="no checkpoint in"):
        load_lora(model, "mine", path)
    (path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ConfigError, match="type IA3, not LoRA"):
        load_lora(model, "mine", path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read") as caught:
        load_lora(model, "mine", path)
    assert "\n" not in str(caught.value)
    assert same_bits(outputs(model), outputs(loaded(original("qwen3"), "qwen3")))


def test_an_adapter_of_another_model_is_refused(adapter: Adapter, original: Any) -> None:
    path = adapter("t5")
    model = loaded(original("qwen3"), "qwen3")
    with pytest.raises(ConfigError, match="does not suit a Qwen3ForCausalLM"):
        load_lora(model, "mine", path)
    assert same_bits(outputs(model), outputs(loaded(original("qwen3"), "qwen3")))


def test_names_and_places_that_make_no_sense_are_refused(adapter: Adapter, original: Any) -> None:
    path = adapter("qwen3")
    model = load_lora(loaded(original("qwen3"), "qwen3"), "mine", path)
    with pytest.raises(ConfigError, match="has an adapter `mine` already"):
        load_lora(model, "mine", path)
    for name in ("", "a.b"):
        with pytest.raises(ConfigError, match="cannot be called"):
            load_lora(model, name, path)
    with pytest.raises(ConfigError, match="a Linear cannot take an adapter"):
        load_lora(torch.nn.Linear(2, 2), "mine", path)
    with pytest.raises(DeviceUnavailable):
        load_lora(model, "other", path, "npu:0")
    for device_map in ({"": "cpu"}, torch.device("cpu")):
        again = load_lora(loaded(original("qwen3"), "qwen3"), "mine", path, device_map)
        assert same_bits(outputs(again), outputs(model))


def test_an_adapter_may_lie_beside_a_model(adapter: Adapter, original: Any, tmp_path: Path) -> None:
    both = Path(shutil.copytree(original("qwen3"), tmp_path / "both"))
    for file in adapter("qwen3").iterdir():
        shutil.copy(file, both)
    model = load_model(both, hf_model_class=AUTO_CLASS["qwen3"])
    assert same_bits(outputs(model), outputs(loaded(original("qwen3"), "qwen3")))

"""Models of transformers on NPUs: every weight right, and where its device map says.

The emulated runtime computes nothing: what is compared is the tensors, and not what a model says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.errors import CheckpointError, DeviceError, DeviceUnavailable
from sllmctl.integrations.hf_build import make_skeleton
from sllmctl.integrations.hf_devices import place_model
from sllmctl.transformers import load_lora, load_model
from tests.device.torch_npu.conftest import Emulator
from tests.integrations.compare import different, loaded
from tests.models import AUTO_CLASS, make_model
from tests.store.conftest import RunningStore

LAYERS = {"model.layers.0": "npu:1", "lm_head": 1, "": torch.device("npu:0")}
BUFFER_BYTES = 65536
"""More than what transformers computes on the host and copies: positions, frequencies."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def place(name: str) -> Path:
        path = root / name
        return path if path.exists() else make_model(name, path)

    return place


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor.cpu() for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def on_devices(path: Path, name: str, device_map: Any, **kw: Any) -> Any:
    return load_model(path, device_map, hf_model_class=AUTO_CLASS[name], **kw)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "gpt2", "t5", "llava"])
@pytest.mark.parametrize("device_map", ["npu:1", "auto", "balanced", {"": 0}], ids=str)
def test_a_model_is_the_same_on_npus(
    name: str, device_map: Any, model_path: Any, emulator: Emulator
) -> None:
    path = model_path(name)
    nbytes = open_checkpoint(path).nbytes
    with emulator.counting() as added:
        model = on_devices(path, name, device_map)
    assert added["async_pageable"] == 0
    assert nbytes <= added["h2d_bytes"] < nbytes + BUFFER_BYTES
    expected = loaded(path, name)
    assert different(tensors(model), tensors(expected)) == set()
    assert model.config.to_dict() == expected.config.to_dict()
    devices = {str(p.device) for p in model.parameters()}
    sole = {"npu:1": "npu:1", "auto": None, "balanced": None}.get(str(device_map), "npu:0")
    assert devices == ({sole} if sole else devices)
    assert all(device.startswith("npu:") for device in devices)


def test_a_load_takes_the_memory_of_the_weights_once(model_path: Any) -> None:
    nbytes = open_checkpoint(model_path("llava")).nbytes
    torch.empty(1, device="npu:0")  # there are no figures before the first of all
    torch.npu.reset_peak_memory_stats(0)
    before = torch.npu.memory_allocated(0)
    model = on_devices(model_path("llava"), "llava", "npu:0")
    peak = torch.npu.max_memory_allocated(0) - before
    assert sum(p.nbytes for p in model.parameters()) <= peak < 1.1 * nbytes + BUFFER_BYTES


def test_auto_spreads_a_model_over_all_npus(model_path: Any) -> None:
    model = load_model(model_path("qwen3"))
    assert {str(p.device) for p in model.parameters()} == {"npu:0", "npu:1"}
    assert set(model.hf_device_map) == {
        *("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1"),
        *("model.norm", "lm_head"),
    }
    sequential = load_model(model_path("qwen3"), "sequential")
    assert {str(p.device) for p in sequential.parameters()} == {"npu:0"}


@pytest.mark.parametrize("fully_parallel", [False, True])
def test_modules_go_where_a_dict_says(
    fully_parallel: bool, model_path: Any, emulator: Emulator
) -> None:
    path = model_path("qwen3")
    with emulator.counting() as added:
        model = load_model(path, LAYERS, fully_parallel=fully_parallel)
    assert added["async_pageable"] == 0
    assert added["h2d_bytes"] < open_checkpoint(path).nbytes + BUFFER_BYTES
    for name, parameter in model.named_parameters():
        there = name.startswith(("model.layers.0.", "lm_head."))
        assert str(parameter.device) == ("npu:1" if there else "npu:0"), name
    assert different(tensors(model), tensors(loaded(path, "qwen3"))) == set()


def test_parallel_preparation_makes_the_same_model(model_path: Any) -> None:
    model = load_model(model_path("qwen3"), "npu:0", fully_parallel=True)
    assert {str(p.device) for p in model.parameters()} == {"npu:0"}
    assert different(tensors(model), tensors(loaded(model_path("qwen3"), "qwen3"))) == set()


@pytest.mark.parametrize(
    ("name", "device_map", "there"),
    [
        # Two models whose checkpoints name modules otherwise than the model does.
        ("qwen2-vl", {"model.visual": 1, "": 0}, "visual."),
        ("llava", {"model.language_model": 1, "": 0}, "language_model.model."),
        # Experts that transformers fuses.
        ("qwen3-moe", {"model.layers.1": 1, "": 0}, "model.layers.1."),
        # A checkpoint without the prefix of the model.
        ("gpt2", {"transformer.h.1": 1, "": 0}, "h.1."),
    ],
)
def test_a_checkpoint_s_names_are_found_among_the_model_s(
    name: str, device_map: Any, there: str, model_path: Any
) -> None:
    path = model_path(name)
    skeleton = make_skeleton(path, AUTO_CLASS[name])
    places = place_model(skeleton.model_class, skeleton.config, device_map, "auto")
    placed = places.place(open_checkpoint(path))
    elsewhere = {key for key, device in placed.items() if str(device) == "npu:1"}
    assert elsewhere == {
        key for key in placed if key.removeprefix("transformer.").startswith(there)
    }
    assert elsewhere


def test_a_warm_model_comes_from_the_store(
    store: RunningStore,
    monkeypatch: pytest.MonkeyPatch,
    emulator: Emulator,
) -> None:
    path = make_model("qwen3", store.storage / "org" / "qwen3")
    monkeypatch.setenv("SLLMCTL_SOCKET", str(store.socket))
    expected = tensors(loaded(path, "qwen3", store="off"))
    for device_map in ("npu:0", LAYERS, "auto"):
        with emulator.counting() as added:
            model = load_model("org/qwen3", device_map, storage_path=store.storage, store="require")
        assert added["async_pageable"] == 0
        assert different(tensors(model), expected) == set()


def test_what_has_no_room_is_told_before_anything_is_read(model_path: Any) -> None:
    config = transformers.Qwen3Config(num_hidden_layers=12)
    with pytest.raises(DeviceError, match=r"a Qwen3ForCausalLM does not fit .* on npu:1"):
        place_model(transformers.Qwen3ForCausalLM, config, "auto", torch.bfloat16)
    with pytest.raises(DeviceUnavailable, match="npu:7"):
        load_model(model_path("qwen3"), {"lm_head": 7, "": 0})


def test_a_misfit_leaves_no_memory_behind(model_path: Any) -> None:
    with pytest.raises(CheckpointError, match="unexpected"):
        load_model(model_path("qwen3"), {"layers.0": 1, "": 0}, hf_model_class="AutoModel")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.parametrize("device_map", ["npu:1", LAYERS], ids=["one", "two"])
def test_an_adapter_goes_to_the_layers_that_it_adapts(
    device_map: Any, model_path: Any, tmp_path: Path, emulator: Emulator
) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"]
    made = peft.get_peft_model(
        loaded(model_path("qwen3"), "qwen3"), peft.LoraConfig(target_modules=targets, r=4)
    ).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "adapter")
    model = load_model(model_path("qwen3"), device_map)
    with emulator.counting() as added:
        model = load_lora(model, "mine", tmp_path / "adapter", torch_dtype="bfloat16")
    assert added["async_pageable"] == 0
    expected = load_lora(
        loaded(model_path("qwen3"), "qwen3"), "mine", tmp_path / "adapter", torch_dtype="bfloat16"
    )
    assert different(tensors(model), tensors(expected)) == set()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            assert {p.device for p in module.parameters()} == {module.base_layer.weight.device}

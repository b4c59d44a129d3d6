"""A loaded model is bit for bit the one that transformers makes of the directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import sllmctl
from sllmctl.errors import (
    CheckpointNotFound,
    ConfigError,
    DeviceUnavailable,
    StoreUnreachable,
)
from sllmctl.integrations.hf_build import build_model, make_skeleton
from sllmctl.transformers import load_model
from tests.integrations.compare import (
    DTYPE,
    assert_same_model,
    assert_same_tokens,
    different,
    loaded,
    outputs,
    reference,
)
from tests.models import AUTO_CLASS, same_bits


def test_model_equals_that_of_from_pretrained(path: Path, name: str) -> None:
    model, expected = loaded(path, name), reference(path, name)
    assert_same_model(model, expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.name_or_path == model.config.name_or_path == str(path)


def test_generation_equals_that_of_from_pretrained(path: Path, name: str) -> None:
    assert_same_tokens(loaded(path, name), reference(path, name))


def test_plain_readers_find_the_source_bits_in_a_converted_directory(
    name: str, original: Any, converted: Any
) -> None:
    source, target = original(name), converted(name)
    assert_same_model(reference(target, name), reference(source, name))
    before = {k: t for file in source.glob("*.safetensors") for k, t in load_file(file).items()}
    after = {k: t for file in target.glob("*.safetensors") for k, t in load_file(file).items()}
    assert different(before, after) == set()


def test_parameters_are_the_loaded_tensors(path: Path, name: str) -> None:
    tensors = sllmctl.load_tensors(path)
    skeleton = make_skeleton(path, AUTO_CLASS[name])
    model = build_model(skeleton, tensors)
    places = {tensor.data_ptr() for tensor in tensors.values()}
    copied = [n for n, p in model.named_parameters() if p.data_ptr() not in places]
    # 5.x makes one parameter of the experts of a layer; all others stay where they are.
    assert [
        n for n in copied if not n.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ] == []


@pytest.mark.parametrize("name", ["qwen3-tied", "opt", "t5", "bart"])
def test_tied_weights_share_memory(path: Path, name: str) -> None:
    model = loaded(path, name)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.data_ptr() == head.data_ptr()
    with torch.no_grad():
        embedding[0, 0] = 7.0
    assert head[0, 0] == 7.0


def test_a_named_alias_is_one_tensor_and_one_parameter(tmp_path: Path, original: Any) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "aliased"
    shutil.copytree(original("qwen3-tied"), path, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = sllmctl.load_tensors(original("qwen3-tied"))
    metadata = {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}
    save_file(tensors, path / "model.safetensors", metadata)
    aliased = sllmctl.load_tensors(path)
    assert aliased["lm_head.weight"] is aliased["model.embed_tokens.weight"]
    assert_same_model(loaded(path, "qwen3-tied"), reference(original("qwen3-tied"), "qwen3-tied"))


@pytest.mark.parametrize("name", ["qwen3", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, "float16", "torch.bfloat16"])
def test_dtype_casts_as_from_pretrained_does(path: Path, name: str, dtype: Any) -> None:
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.split(".")[-1])
    model = loaded(path, name, torch_dtype=dtype)
    assert model.dtype == wanted
    assert_same_model(model, reference(path, name, **{DTYPE: wanted}))


def test_dtype_has_the_name_that_transformers_gives_it_too(original: Any) -> None:
    assert load_model(original("qwen3"), dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_without_dtype_in_the_configuration_the_weights_decide(
    path: Path, name: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "no-dtype"))
    config = json.loads((copy / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    (copy / "config.json").write_text(json.dumps(config))
    assert loaded(copy, name).dtype == torch.bfloat16


def test_settings_without_generation_config_come_from_the_configuration(
    tmp_path: Path, original: Any
) -> None:
    path = Path(shutil.copytree(original("bart"), tmp_path / "old"))
    (path / "generation_config.json").unlink()
    config = json.loads((path / "config.json").read_text()) | {"num_beams": 4, "max_length": 77}
    (path / "config.json").write_text(json.dumps(config))
    mine, other = loaded(path, "bart").generation_config, reference(path, "bart").generation_config
    assert mine.num_beams == 4
    assert mine.to_dict() == other.to_dict()


def test_names_are_found_below_the_storage_path(
    tmp_path: Path, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(original("qwen3"), tmp_path / "org" / "qwen3")
    model = load_model("org/qwen3", storage_path=tmp_path)
    assert model.name_or_path == str(tmp_path / "org" / "qwen3")
    monkeypatch.setenv("SLLMCTL_STORAGE_PATH", str(tmp_path))
    assert type(load_model("org/qwen3", fully_parallel=True)) is type(model)


def test_a_required_store_that_is_not_there_is_an_error(
    tmp_path: Path, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLLMCTL_SOCKET", str(tmp_path / "none.sock"))
    with pytest.raises(StoreUnreachable):
        load_model(original("qwen3"), store="require")


def test_a_use_of_the_store_that_there_is_not_is_an_error(original: Any) -> None:
    with pytest.raises(ConfigError, match="`required` is not a value of `store`") as caught:
        load_model(original("qwen3"), store="required")  # type: ignore[arg-type]
    assert caught.value.hint == "auto; require; off"


@pytest.mark.parametrize("name", ["config", "state_dict", "output_loading_info", "max_memory"])
def test_what_only_from_pretrained_takes_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"load_model takes no `{name}`"):
        load_model(tmp_path, **{name: None})


def test_only_local_files_are_ever_used(original: Any) -> None:
    model = load_model(original("qwen3"), local_files_only=True)
    assert_same_model(model, reference(original("qwen3"), "qwen3"))


@pytest.mark.parametrize("setting", [{"attn_implementation": "magic"}, {"magic": 1}])
def test_a_setting_that_the_class_does_not_know_is_refused(setting: Any, original: Any) -> None:
    with pytest.raises(ConfigError, match="makes no Qwen3ForCausalLM of .*magic"):
        load_model(original("qwen3"), **setting)


@pytest.mark.parametrize("device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}])
def test_every_way_to_say_cpu_loads(device_map: Any, original: Any) -> None:
    model = load_model(original("qwen3"), device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("device_map", [0, "npu:0", torch.device("cuda:0"), {"": "cuda"}])
def test_an_accelerator_that_is_not_there_is_refused_at_once(
    device_map: Any, tmp_path: Path
) -> None:
    with pytest.raises(DeviceUnavailable, match="cannot use"):
        load_model(tmp_path / "nothing", device_map)


@pytest.mark.parametrize(
    "device_map", ["disk", {"model": "cpu", "lm_head": "disk"}, {}, "somewhere"]
)
def test_a_device_map_that_makes_no_sense_is_refused(device_map: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_model(tmp_path / "nothing", device_map)


@pytest.mark.parametrize("dtype", ["int8", "half-ish", torch.int64, 16])
def test_a_dtype_that_is_not_floating_is_refused(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a floating dtype"):
        load_model(tmp_path / "nothing", torch_dtype=dtype)


def test_classes_are_taken_as_such_and_by_name(original: Any) -> None:
    path = original("qwen3")
    for wanted in (
        "Qwen3ForCausalLM",
        transformers.Qwen3ForCausalLM,
        transformers.AutoModelForCausalLM,
    ):
        assert type(load_model(path, hf_model_class=wanted)) is transformers.Qwen3ForCausalLM


def test_an_unknown_class_is_refused_by_name(original: Any) -> None:
    with pytest.raises(ConfigError, match="no model class `AutoModelForMagic`"):
        load_model(original("qwen3"), hf_model_class="AutoModelForMagic")


def test_a_class_that_does_not_suit_names_the_one_that_does(original: Any) -> None:
    with pytest.raises(ConfigError, match="T5Config") as caught:
        load_model(original("t5"))
    assert "T5ForConditionalGeneration" in str(caught.value.hint)


def test_settings_override_the_configuration(original: Any) -> None:
    model = load_model(original("qwen3"), use_cache=False, attn_implementation="eager")
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"


def test_a_directory_without_configuration_is_refused(tmp_path: Path, original: Any) -> None:
    shutil.copytree(
        original("qwen3"), tmp_path / "bare", ignore=shutil.ignore_patterns("config.json")
    )
    with pytest.raises(CheckpointNotFound, match="no config"):
        load_model(tmp_path / "bare")


def test_a_damaged_configuration_is_one_line(tmp_path: Path, original: Any) -> None:
    path = Path(shutil.copytree(original("qwen3"), tmp_path / "damaged"))
    for text in ("{", '{"model_type": "qwen3", "hidden_size": "wide"}', '{"model_type": "magic"}'):
        (path / "config.json").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


CODE = """
from transformers import PretrainedConfig, Qwen3Config, Qwen3ForCausalLM
class OwnConfig(Qwen3Config):
    model_type = "own"
class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_checkpoint_runs_only_when_trusted(
    tmp_path: Path, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    path = Path(shutil.copytree(original("qwen3"), tmp_path / "own"))
    (path / "own.py").write_text(CODE)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="makes no AutoModelForCausalLM") as caught:
        load_model(path)
    assert "trust_remote_code" in str(caught.value.hint)
    model = load_model(path, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert same_bits(outputs(model), outputs(reference(original("qwen3"), "qwen3")))


PARALLEL = """
import sys
from sllmctl.transformers import load_model
model = load_model(sys.argv[1], fully_parallel=True)
print(type(model).__name__, sum(p.numel() for p in model.parameters()))
"""


def test_parallel_preparation_works_in_a_fresh_interpreter(converted: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PARALLEL, str(converted("qwen3"))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Qwen3ForCausalLM ")


@pytest.mark.parametrize("name", ["qwen3", "t5", "llava"])
def test_parallel_preparation_makes_the_same_model(name: str, converted: Any) -> None:
    path = converted(name)
    assert_same_model(loaded(path, name, fully_parallel=True), reference(path, name))


def test_parallel_preparation_raises_what_preparation_raises(original: Any) -> None:
    with pytest.raises(ConfigError, match="T5Config"):
        load_model(original("t5"), fully_parallel=True)

"""What the loader for vLLM does around vLLM's part, with bare classes in the place of vLLM's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sllmctl.core.write.convert import convert
from sllmctl.errors import CheckpointError, CheckpointNotFound, ChecksumMismatch, ConfigError
from sllmctl.integrations.engine_rank import RankKey
from sllmctl.integrations.engine_source import EngineOptions, EngineWeights, find_model
from tests.conftest import write_checkpoint


class Base:
    """As much of vLLM's ``BaseModelLoader`` as ours needs."""

    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config

    def load_model(self: Any, vllm_config: Any, model_config: Any) -> nn.Module:
        with torch.device("cpu"):
            model = vllm_config.make()
        self.load_weights(model, model_config)
        model.made_after = torch.zeros(1)
        return model  # type: ignore[no-any-return]


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of our loader, of a vLLM before 0.20."""
    layers = "vllm.model_executor.layers.quantization.kv_cache"
    loader = "vllm.model_executor.model_loader"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        layers: {"BaseKVCacheMethod": type("BaseKVCacheMethod", (), {})},
        f"{loader}.base_loader": {"BaseModelLoader": Base},
        f"{loader}.default_loader": {"DefaultModelLoader": Base},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    ours = "sllmctl.integrations.vllm_loader"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    yield importlib.import_module(ours)
    sys.modules.pop(ours, None)


class Model(nn.Module):
    """Fills its rows from a pool of threads, as large models do."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(4, 8), requires_grad=False)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        with ThreadPoolExecutor(2) as pool:
            for name, tensor in weights:
                for row in range(len(tensor)):
                    pool.submit(self.rows[row].copy_, tensor[row])
                loaded.add(name)
        return loaded


def fill(loaders: Any, path: Path, rows: int, **extra: Any) -> RankKey:
    """Load rows of the model's four, with rank state; give the state's key."""
    write_checkpoint(path, {"model.safetensors": {"rows": torch.ones(rows, 8)}})
    extra = {"store": "off", "rank_state": "auto", **extra}
    loader = loaders.SllmLoader(SimpleNamespace(model_loader_extra_config=extra))
    options = EngineOptions.parse(extra)
    loader._weights = EngineWeights(find_model(options, str(path)), options)
    loader._rank_key = RankKey(path, 0, {"engine": "vllm"})
    loader.load_weights(Model(), SimpleNamespace(runner_type="generate"))
    return loader._rank_key  # type: ignore[no-any-return]


def test_a_model_that_is_known_to_be_whole_is_kept(loaders: Any, tmp_path: Path) -> None:
    assert fill(loaders, tmp_path / "model", rows=4).path.is_dir()


@pytest.mark.parametrize("check", ["names", "off"])
def test_a_model_that_was_not_checked_to_the_last_byte_is_not_kept(
    loaders: Any, tmp_path: Path, check: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not fill(loaders, tmp_path / "model", rows=3, check=check).path.exists()
    assert f'the rank state is not written: "check" is "{check}"' in caplog.text


def test_what_a_pool_of_threads_writes_is_seen(loaders: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="`rows` got 96 of 128 bytes"):
        fill(loaders, tmp_path / "model", rows=3)


@pytest.mark.parametrize("made", [torch.zeros, torch.empty])
def test_padding_is_the_models_own_if_it_filled_it(
    loaders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    def make() -> Model:
        model = Model()
        model.rows = nn.Parameter(made(6, 8), requires_grad=False)
        return model

    write_checkpoint(tmp_path, {"model.safetensors": {"rows": torch.ones(4, 8)}})
    monkeypatch.setattr(loaders, "_place", lambda: (0, 1))
    loader = loaders.SllmLoader(SimpleNamespace(model_loader_extra_config={"store": "off"}))
    config = SimpleNamespace(model=str(tmp_path), quantization=None)
    engine = SimpleNamespace(make=make, model_config=config)
    if made is torch.empty:
        with pytest.raises(CheckpointError, match="`rows` got 128 of 192 bytes"):
            loader.load_model(engine, config)
    else:
        assert loader.load_model(engine, config).rows.tolist() == [[1.0] * 8] * 4 + [[0.0] * 8] * 2
    assert not torch.overrides._get_current_function_mode_stack()


class Headed(Model):
    """Notes what it found, as a draft does that may have a head of its own."""

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        self.has_own_lm_head = True
        return super().load_weights(weights)


def loader_for(
    loaders: Any, monkeypatch: pytest.MonkeyPatch, path: Path, **extra: Any
) -> tuple[Any, RankKey]:
    """A loader that finds its rank's state by itself; and the state's key."""
    key = RankKey(path, 0, {"engine": "vllm"})
    monkeypatch.setattr(loaders, "_place", lambda: (1, 2))
    monkeypatch.setattr(loaders, "rank_key", lambda found, config: key)
    extra = {"store": "off", "rank_state": "auto", **extra}
    return loaders.SllmLoader(SimpleNamespace(model_loader_extra_config=extra)), key


def config_of(path: Path) -> Any:
    return SimpleNamespace(model=str(path), quantization=None, runner_type="generate")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rows = {"model.safetensors": {"rows": torch.arange(32.0).view(4, 8)}}
    return convert(write_checkpoint(tmp_path / "source", rows), tmp_path / "model").path


def test_a_model_whose_load_sets_more_than_tensors_is_not_kept(
    loaders: Any, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, caplog: Any
) -> None:
    for _ in range(2):
        loader, key = loader_for(loaders, monkeypatch, checkpoint)
        model = Headed()
        loader.load_weights(model, config_of(checkpoint))
        assert model.has_own_lm_head and model.rows[3, 7] == 31
    assert not key.path.exists()
    assert "the load sets `has_own_lm_head`" in caplog.text


def test_a_state_that_does_not_fit_is_made_anew(
    loaders: Any, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, caplog: Any
) -> None:
    loader, _ = loader_for(loaders, monkeypatch, checkpoint)
    loader.load_weights(Model(), config_of(checkpoint))
    for rank_state in ("require", "auto", "require"):
        loader, _ = loader_for(loaders, monkeypatch, checkpoint, rank_state=rank_state)
        model = Model()
        # As a setting does of which the key knows nothing.
        model.rows = nn.Parameter(torch.zeros(5, 8), requires_grad=False)
        loader._initial._filled.add(model.rows.untyped_storage().data_ptr())
        if rank_state == "require" and "the model is loaded as ever" not in caplog.text:
            with pytest.raises(CheckpointError, match=r"does not fit a Model: rows is .*4, 8"):
                loader.load_weights(model, config_of(checkpoint))
        else:
            loader.load_weights(model, config_of(checkpoint))
            assert model.rows[3, 7] == 31
        assert loader._weights is None


def test_a_state_of_an_unverified_load_does_for_none_that_verifies(
    loaders: Any, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    shard = checkpoint / "model.safetensors"
    whole = shard.read_bytes()
    stamp = shard.stat().st_mtime_ns

    def load(content: bytes, **extra: Any) -> float:
        shard.write_bytes(content)
        os.utime(shard, ns=(stamp, stamp))
        loader, _ = loader_for(loaders, monkeypatch, checkpoint, **extra)
        model = Model()
        loader.load_weights(model, config_of(checkpoint))
        return float(model.rows[3, 7])

    damaged = whole[:-1] + bytes([whole[-1] ^ 1])
    # The second of two ranks: it, too, compares what it keeps.
    assert load(damaged) != 31
    with pytest.raises(ChecksumMismatch):
        load(damaged, verify=True)
    with pytest.raises(CheckpointError, match="did not verify"):
        load(whole, verify=True, rank_state="require")
    assert load(whole, verify=True) == 31
    assert load(whole, verify=True, rank_state="require") == 31


def test_a_reload_finds_out_at_once_that_it_cannot(
    loaders: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loader, _ = loader_for(loaders, monkeypatch, tmp_path)
    with pytest.raises(CheckpointNotFound, match=r"nowhere.*\("):
        loader.get_all_weights(config_of(tmp_path / "nowhere"), Model())


def test_a_misspelt_option_is_refused_with_what_was_meant(loaders: Any) -> None:
    config = SimpleNamespace(model_loader_extra_config={"modle": "a"})
    with pytest.raises(ConfigError, match="did you mean `model`"):
        loaders.SllmLoader(config)

"""What the loader for SGLang does around SGLang's part, with bare classes for SGLang's own."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sllmctl.errors import CheckpointError, ConfigError
from tests.conftest import write_checkpoint


class Model(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(rows, 8), requires_grad=False)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            self.rows[: len(tensor)].copy_(tensor)


class Base:
    """As much of SGLang's ``DefaultModelLoader`` as ours needs."""

    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config

    def load_model(self: Any, *, model_config: Any, device_config: Any) -> nn.Module:
        with torch.device("cpu"):
            model = Model(model_config.rows)
        weights = self._get_all_weights(model_config, model)
        model.load_weights(weights)
        return model


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of our loader, in a server of `target`."""
    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt.model_loader.loader": {"DefaultModelLoader": Base},
        "sglang.srt.runtime_context": {
            "get_server_args": lambda: SimpleNamespace(model_path="target", nnodes=1)
        },
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    ours = "sllmctl.integrations.sglang_loader"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    yield importlib.import_module(ours)
    sys.modules.pop(ours, None)


def load(loaders: Any, model: Any, storage: Path, rows: int = 4, **config: Any) -> list[float]:
    """The first column of what is loaded for one of SGLang's models."""
    extra = {"sllm": {"store": "off", "storage_path": str(storage), "model": model}}
    loader = loaders.SllmLoader(SimpleNamespace(model_loader_extra_config=extra))
    model_config = SimpleNamespace(rows=rows, **config)
    filled = loader.load_model(model_config=model_config, device_config=None)
    return [row[0] for row in filled.rows.tolist()]


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    for number, name in enumerate(("one", "two"), 1):
        tensors = {"rows": torch.full((4, 8), float(number))}
        write_checkpoint(tmp_path / name, {"model.safetensors": tensors})
    return tmp_path


def test_one_model_in_the_options_is_not_the_drafts(loaders: Any, storage: Path) -> None:
    assert load(loaders, "one", storage, model_path="target") == [1.0] * 4
    draft = {"model_path": str(storage / "two"), "is_draft_model": True}
    assert load(loaders, "one", storage, **draft) == [2.0] * 4
    by_model = {"target": "two", draft["model_path"]: "one"}
    assert load(loaders, by_model, storage, **draft) == [1.0] * 4
    # Layers that predict further tokens are in the model's own files.
    assert load(loaders, "one", storage, model_path="target", is_draft_model=True) == [1.0] * 4


def test_padding_that_the_model_made_itself_may_stay(loaders: Any, storage: Path) -> None:
    assert load(loaders, "one", storage, rows=5, model_path="target") == [1.0] * 4 + [0.0]
    write_checkpoint(storage / "none", {"model.safetensors": {}})
    with pytest.raises(CheckpointError, match="`rows` got 0 of 128 bytes"):
        load(loaders, "none", storage, model_path="target")


def test_what_is_no_option_is_refused_with_its_hint(loaders: Any) -> None:
    config = SimpleNamespace(model_loader_extra_config={"sllm": json.dumps({})})
    with pytest.raises(ConfigError, match="not a JSON object"):
        loaders.SllmLoader(config)

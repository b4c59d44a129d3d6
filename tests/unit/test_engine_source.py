"""What an engine's loader is asked for, and which checkpoint that means. No engine takes part."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sllmctl.errors import (
    CheckpointError,
    CheckpointNotFound,
    ChecksumMismatch,
    ConfigError,
    StoreUnreachable,
)
from sllmctl.integrations.engine_source import EngineOptions, EngineWeights, describe, find_model
from tests.conftest import same_bits, some_tensors, write_checkpoint

TENSORS = some_tensors(0)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLLMCTL_STORAGE_PATH", str(tmp_path / "models"))
    write_checkpoint(tmp_path / "models" / "org" / "tiny", {"model.safetensors": TENSORS})
    return tmp_path / "models"


def open_weights(options: EngineOptions, engine_model: str, **place: int) -> EngineWeights:
    return EngineWeights(find_model(options, engine_model), options, **place)


def bare(path: Path, architecture: str = "TinyForCausalLM") -> Path:
    """A directory of configuration without weights, as an engine is given."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return path


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"modell": "a"}, "did you mean `model`"),
        ({"nothing": 1}, "it has model, storage_path"),
        ({"store": "maybe"}, "auto; require; off"),
        ({"check": True}, "full; names; off"),
        ({"rank_state": "on"}, "off; auto; require"),
        ({"verify": "yes"}, "true; false"),
        ({"model": 3}, "give a path"),
        ({"model": {"a": ""}}, "give a path"),
        ({"model": {}}, "give a path"),
        ({"model": [{}]}, "give a path"),
        ({"store": {}}, "auto; require; off"),
        ({"socket": 3}, "as text"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(extra: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineOptions.parse(extra)
    assert word in str(caught.value.hint)


def test_an_extra_configuration_that_is_no_object_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a JSON object"):
        EngineOptions.parse("model")


def test_null_is_no_value() -> None:
    names = ("model", "storage_path", "store", "socket", "verify", "check", "rank_state")
    assert EngineOptions.parse(dict.fromkeys(names)) == EngineOptions.parse({}) == EngineOptions()


def test_the_option_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLMCTL_STORE", "require")
    assert EngineOptions.parse({}).store == "require"
    assert EngineOptions.parse({"store": "off"}).store == "off"
    monkeypatch.setenv("SLLMCTL_STORE", "never")
    with pytest.raises(ConfigError, match="never"):
        EngineOptions.parse({})


def test_a_path_with_weights_is_loaded_from_there(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "org" / "tiny", {"model.safetensors": some_tensors(1)})
    options = EngineOptions.parse({})
    assert options.model_for(str(path)) == str(path)
    monkeypatch.chdir(tmp_path)
    # The engine takes a relative directory before a name, and so do we.
    assert options.model_for("org/tiny") == "./org/tiny"
    with_name = open_weights(options, "org/tiny")
    assert "layers.1.weight" in with_name.names


def test_a_name_is_looked_up_below_the_storage_path(storage: Path) -> None:
    assert "layers.0.weight" in open_weights(EngineOptions.parse({}), "org/tiny").names


def test_a_directory_without_weights_below_the_storage_path_goes_by_its_name(
    storage: Path,
) -> None:
    assert EngineOptions.parse({}).model_for(str(bare(storage / "org" / "gone"))) == "org/gone"


def test_the_store_shows_a_path_below_the_storage_path_by_its_name(storage: Path) -> None:
    options = EngineOptions.parse({})
    found = find_model(options, str(storage / "org" / "tiny"))
    assert options.label_for(found) == "org/tiny"
    elsewhere = write_checkpoint(storage.parent / "else", {"model.safetensors": TENSORS})
    assert options.label_for(find_model(options, str(elsewhere))) == str(elsewhere)


def test_a_snapshot_in_a_hub_cache_goes_by_its_name(storage: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("0123456789" * 4)
    assert EngineOptions.parse({}).model_for(str(bare(snapshot))) == "org/tiny"


def test_the_option_names_another_model_by_the_engines_one(storage: Path, tmp_path: Path) -> None:
    engine = str(bare(tmp_path / "engine"))
    assert EngineOptions.parse({"model": "org/tiny"}).model_for(engine) == "org/tiny"
    several = EngineOptions.parse({"model": {engine: "org/tiny"}})
    assert several.model_for(engine) == "org/tiny"
    assert several.model_for("org/draft") == "org/draft"


def test_tensors_are_views_of_what_was_loaded(storage: Path) -> None:
    weights = open_weights(EngineOptions.parse({}), "org/tiny", rank=0, ranks=2)
    got = dict(weights.tensors())
    assert weights.names == TENSORS.keys()
    assert all(same_bits(got[name], TENSORS[name]) for name in TENSORS)
    # Several ranks share the page cache.
    assert weights.stats.mapped_bytes == weights.stats.bytes
    weights.close()
    assert same_bits(got["layers.0.weight"], TENSORS["layers.0.weight"])


def test_several_ranks_map_what_one_would_read(
    tmp_path: Path, make_cold: Callable[[Path], None]
) -> None:
    large = {"large": torch.zeros(2**23, dtype=torch.uint8)}
    path = write_checkpoint(tmp_path / "large", {"model.safetensors": large})
    options = EngineOptions.parse({})
    make_cold(path)
    assert open_weights(options, str(path)).stats.mapped_bytes == 0
    make_cold(path)
    assert open_weights(options, str(path), rank=1, ranks=2).stats.mapped_bytes == 2**23


def test_several_ranks_map_nothing_where_that_is_forbidden(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLLMCTL_MAP", "never")
    assert open_weights(EngineOptions(), "org/tiny", rank=0, ranks=2).stats.mapped_bytes == 0


def test_weights_of_another_architecture_are_refused(storage: Path, tmp_path: Path) -> None:
    bare(storage / "org" / "tiny", "OtherForCausalLM")
    engine = str(bare(tmp_path / "engine"))
    with pytest.raises(CheckpointError, match=r"OtherForCausalLM.*TinyForCausalLM"):
        open_weights(EngineOptions.parse({"model": "org/tiny"}), engine)
    bare(storage / "org" / "tiny")
    open_weights(EngineOptions.parse({"model": "org/tiny"}), engine)


def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(storage: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="org/tinny") as caught:
        open_weights(EngineOptions.parse({"store": "off"}), "org/tinny")
    assert "org/tiny" in str(caught.value.hint)


def test_a_directory_without_weights_asks_for_the_checkpoints_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no \\*.safetensors file") as caught:
        open_weights(EngineOptions(), str(bare(tmp_path / "engine")))
    assert "name the checkpoint as `model`" in str(caught.value.hint)


def test_a_required_store_that_does_not_answer_is_an_error(storage: Path) -> None:
    with pytest.raises(StoreUnreachable):
        open_weights(EngineOptions.parse({"store": "require"}), "org/tiny")


def test_verify_finds_a_flipped_byte_and_the_second_rank_leaves_it_to_the_first(
    storage: Path, tmp_path: Path
) -> None:
    from sllmctl.core.write.convert import convert

    path = convert(storage / "org" / "tiny", tmp_path / "converted").path
    shard = path / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    options = EngineOptions.parse({"verify": True})
    with pytest.raises(ChecksumMismatch, match=re.escape(str(shard))):
        open_weights(options, str(path))
    assert not open_weights(options, str(path), rank=1, ranks=2).stats.verified
    # What it may keep as a state of its own, it compares itself.
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors` is damaged between bytes 0"):
        open_weights(options, str(path), rank=1, ranks=2, keeps=True)
    shard.write_bytes(whole)
    for rank in range(2):
        stats = open_weights(options, str(path), rank=rank, ranks=2, keeps=True).stats
        # Without a copy of the checkpoint for each rank.
        assert stats.verified and stats.mapped_bytes == stats.bytes


def test_what_a_load_did_fits_on_a_line(storage: Path) -> None:
    alone = describe(open_weights(EngineOptions.parse({}), "org/tiny").stats)
    assert re.fullmatch(
        r"12 tensors, \d+ bytes: \d+ (mapped from files|from disk|from the page cache), [\d.]+ s",
        alone,
    )
    shared = describe(open_weights(EngineOptions.parse({}), "org/tiny", rank=1, ranks=2).stats)
    assert re.fullmatch(r"12 tensors, (\d+) bytes: \1 mapped from files, [\d.]+ s", shared)


def test_the_entry_point_leads_to_a_function_that_imports_nothing_heavy() -> None:
    root = Path(__file__).parents[2]
    text = (root / "pyproject.toml").read_text()
    target = re.search(
        r'^\[project.entry-points."vllm.general_plugins"\]\nsllm = "(.+):(.+)"$', text, re.M
    )
    assert target is not None
    script = (
        f"import sys, {target[1]}; assert callable({target[1]}.{target[2]});"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(root)}
    )


def test_views_that_a_model_keeps_outlive_the_load(storage: Path) -> None:
    weights = open_weights(EngineOptions.parse({}), "org/tiny")
    kept = torch.nn.Parameter(dict(weights.tensors())["layers.0.bias"])
    weights.close()
    del weights
    assert same_bits(kept.data, TENSORS["layers.0.bias"])

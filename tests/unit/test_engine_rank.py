"""Rank state: written in one step, found by its fingerprint, refused with the reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.verify import verify
from sllmctl.core.write.convert import convert
from sllmctl.core.write.sources import list_source
from sllmctl.errors import CheckpointError, ConfigError
from sllmctl.integrations.engine_rank import (
    STATE_NAME,
    RankKey,
    checkpoint_digest,
    fill_from_rank_state,
    find_rank_state,
    mark_verified,
    save_rank_state,
)
from sllmctl.integrations.engine_source import EngineOptions, EngineWeights
from sllmctl.integrations.engine_state import Snapshot
from tests.conftest import same_bits, write_checkpoint

MADE_BY = {"engine": "vllm", "engine_version": "1.2.3", "tensor_parallel_size": 2}


class Tied(nn.Module):
    """Two names of one parameter, a buffer, an empty parameter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(8, 4, bias=False)
        self.head = nn.Linear(8, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.randn(3).to(torch.bfloat16))
        self.none = nn.Parameter(torch.empty(0, 2))


@pytest.fixture
def key(tmp_path: Path) -> RankKey:
    return RankKey(tmp_path / "model", 0, MADE_BY)


def load(key: RankKey, model: nn.Module) -> None:
    found = find_rank_state(key)
    weights = EngineWeights(found, EngineOptions(store="off"))
    fill_from_rank_state(model, dict(weights.tensors()), where=found.model)


def test_a_fresh_model_takes_the_state_bit_by_bit(key: RankKey) -> None:
    model, fresh = Tied(1), Tied(2)
    save_rank_state(key, model, Snapshot.of(model))
    load(key, fresh)
    for name, tensor in model.state_dict().items():
        assert same_bits(fresh.state_dict()[name], tensor), name
    # Tied tensors are stored once.
    checkpoint = open_checkpoint(key.path)
    assert checkpoint.aliases == {"head.weight": "embed.weight"}
    assert checkpoint.nbytes == 4 * 8 * 4 + 6


def test_a_key_is_the_same_whatever_the_order() -> None:
    turned = dict(reversed(list(MADE_BY.items())))
    assert RankKey(Path("m"), 0, turned).path == RankKey(Path("m"), 0, MADE_BY).path
    other = RankKey(Path("m"), 0, {**MADE_BY, "engine_version": "1.2.4"})
    assert other.path != RankKey(Path("m"), 0, MADE_BY).path


def test_without_a_state_the_hint_says_how_to_make_one(key: RankKey) -> None:
    with pytest.raises(CheckpointError, match="has no rank state") as caught:
        find_rank_state(key)
    assert "sllmctl convert --engine" in str(caught.value.hint)


def test_a_state_that_does_not_fit_is_refused_with_the_difference(key: RankKey) -> None:
    model = Tied()
    save_rank_state(key, model, Snapshot.of(model))
    save_rank_state(replace(key, made_by={"engine": "another"}), model, Snapshot.of(model))
    newer = replace(key, made_by={**MADE_BY, "engine_version": "1.3.0"})
    with pytest.raises(CheckpointError) as caught:
        find_rank_state(newer)
    # Of all that are there, the nearest.
    assert str(caught.value) == (
        f"no rank state of `{key.model}` fits rank 0: engine_version is 1.2.3 there and 1.3.0 here"
    )
    with pytest.raises(CheckpointError, match="for other ranks only"):
        find_rank_state(replace(key, rank=1))


def test_a_state_under_a_wrong_name_is_refused(key: RankKey) -> None:
    model = Tied()
    save_rank_state(key, model, Snapshot.of(model))
    other = replace(key, made_by={**MADE_BY, "tensor_parallel_size": 4})
    other.path.parent.mkdir()
    key.path.rename(other.path)
    with pytest.raises(CheckpointError, match="tensor_parallel_size is 2 there and 4 here"):
        find_rank_state(other)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"made_by": 1}', "[" * 100_000),
        '{"format_version": 1, "made_by": {}, "rank": 0}',
        '{"format_version": 2, "made_by": 7}',
        '{"format_version": 3, "made_by": {}}',
    ],
)
def test_a_damaged_description_is_refused(key: RankKey, content: str) -> None:
    model = Tied()
    save_rank_state(key, model, Snapshot.of(model))
    (key.path / STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match="damaged or outdated rank state") as caught:
        find_rank_state(key)
    assert str(key.path) in str(caught.value.hint)
    # Others' damage says nothing of what would fit.
    newer = replace(key, made_by={**MADE_BY, "engine_version": "1.3.0"})
    with pytest.raises(CheckpointError, match="fits rank 0: all of them are damaged"):
        find_rank_state(newer)
    save_rank_state(replace(key, rank=1), model, Snapshot.of(model))
    with pytest.raises(CheckpointError, match="engine_version is 1.2.3 there and 1.3.0 here"):
        find_rank_state(newer)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: setattr(m, "embed", nn.Linear(8, 5, bias=False)), r"\(5, 8\)"),
        (lambda m: m.to(torch.float16), "float16"),
        (lambda m: setattr(m, "more", nn.Parameter(torch.ones(1))), "more is None there"),
        (lambda m: delattr(m, "head"), "head.weight .* None here"),
    ],
)
def test_a_state_of_another_model_is_refused_and_nothing_copied(
    key: RankKey, change: Callable[[nn.Module], object], word: str
) -> None:
    model, other = Tied(1), Tied(2)
    save_rank_state(key, model, Snapshot.of(model))
    change(other)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=word):
        load(key, other)
    assert all(same_bits(other.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_model_that_its_load_changes_is_not_kept(key: RankKey) -> None:
    model = Tied()
    before = Snapshot.of(model)
    model.embed.weight.data = torch.ones(4, 9)
    with pytest.raises(CheckpointError, match="changes while it is loaded"):
        save_rank_state(key, model, before)
    assert not key.path.exists()


class Noting(Tied):
    """Has beside its state what models have: flags, tables of angles, references."""

    angles: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.own_head = False
        self.broadcast: torch.Tensor | None = None
        self.loaded: list[object] = []
        self.names: dict[str, Any] = {"a": [torch.ones(2)], "size": torch.Size([1, 2])}
        self.names["itself"] = self.names
        self.same = self.embed.weight.detach()
        self.all = [self.embed.weight, self.embed.weight[1:].detach()]
        self.register_buffer("angles", torch.full((2, 3), torch.nan), persistent=False)
        self.empty = torch.empty(0)
        self.conjugate = torch.zeros(2, dtype=torch.complex64).conj()
        self.meta = torch.empty(3, device="meta")


def test_a_load_that_fills_the_state_alone_is_kept(key: RankKey) -> None:
    model = Noting()
    before = Snapshot.of(model)
    with torch.no_grad():
        model.embed.weight.copy_(torch.ones(4, 8))  # and `same` with it
        model.steps.copy_(torch.ones(3))
    model.own_head = False
    model.loaded = []
    model.pending: dict[str, object] = {}  # as DeepSeek's load leaves behind
    assert before.changes(model) == []
    save_rank_state(key, model, before)
    assert key.path.is_dir()


def test_memory_that_many_modules_share_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList(Noting() for _ in range(5))
    shared = torch.zeros(1000)
    for number, module in enumerate(model):
        module.register_buffer("scratch", shared[number:], persistent=False)
        module.wide = shared[:1].expand(10**12)
    read: list[torch.Tensor] = []
    cpu = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        read.append(tensor)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    before = Snapshot.of(model)
    assert sum(tensor.numel() == 4000 for tensor in read) == 1
    shared[-1] = 1
    assert [text for text in before.changes(model) if "scratch" in text] == [
        f"the load sets `{number}.scratch`" for number in range(5)
    ]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("own_head", lambda m: setattr(m, "own_head", True)),
        ("broadcast", lambda m: setattr(m, "broadcast", m.embed.weight.sum(dim=1))),
        ("loaded", lambda m: m.loaded.append("embed")),
        ("names", lambda m: m.names["a"][0].zero_()),
        ("angles", lambda m: m.angles.data.fill_(1)),
        ("more", lambda m: m.register_buffer("more", torch.ones(1), persistent=False)),
        ("own_head", lambda m: delattr(m, "own_head")),
        ("embed.scaled", lambda m: setattr(m.embed, "scaled", object())),
        ("embed.weight.shards", lambda m: setattr(m.embed.weight, "shards", [1])),
    ],
)
def test_a_load_that_does_more_is_not_kept_for_a_fresh_model_would_lack_it(
    key: RankKey, name: str, change: Callable[[nn.Module], object]
) -> None:
    model = Noting()
    before = Snapshot.of(model)
    change(model)
    with pytest.raises(CheckpointError, match=f"the load sets `{name}`"):
        save_rank_state(key, model, before)
    assert not key.path.exists()


def test_who_verifies_takes_no_state_of_a_load_that_did_not(key: RankKey) -> None:
    model = Tied()
    save_rank_state(key, model, Snapshot.of(model))
    assert find_rank_state(key).path == key.path
    with pytest.raises(CheckpointError, match="a load that did not verify its checkpoint"):
        find_rank_state(key, verified=True)
    mark_verified(key.path)  # as a conversion does that has verified its target
    assert find_rank_state(key, verified=True).path == key.path
    save_rank_state(key, model, Snapshot.of(model))
    with pytest.raises(CheckpointError, match="did not verify"):
        find_rank_state(key, verified=True)
    save_rank_state(key, model, Snapshot.of(model), verified=True)
    assert find_rank_state(key, verified=True).path == key.path
    assert verify(key.path).warnings == ()


WRITER = """
import sys
from pathlib import Path
import tests.unit.test_engine_rank as t
from sllmctl.core.write.target import Target
import os, signal
rank, kill = int(sys.argv[2]), sys.argv[3] == "kill"
if kill:
    Target.publish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
model = t.Tied(rank)
t.save_rank_state(t.RankKey(Path(sys.argv[1]), rank, t.MADE_BY), model, t.Snapshot.of(model))
"""


def write_elsewhere(key: RankKey, rank: int, how: str = "whole") -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(key.model), str(rank), how],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_ranks_write_at_once_and_a_killed_one_leaves_nothing(key: RankKey) -> None:
    killed, whole = write_elsewhere(key, 0, "kill"), write_elsewhere(key, 1)
    assert killed.wait(60) == -signal.SIGKILL
    assert whole.wait(60) == 0
    with pytest.raises(CheckpointError, match="for other ranks only"):
        find_rank_state(key)
    for rank in range(2):
        if rank == 0:
            model = Tied(0)
            save_rank_state(key, model, Snapshot.of(model))
        fresh = Tied(7)
        load(replace(key, rank=rank), fresh)
        assert same_bits(fresh.embed.weight.data, Tied(rank).embed.weight.data)
    assert sorted(path.name for path in key.path.parent.iterdir()) == ["rank_0", "rank_1"]


def test_two_that_write_the_same_rank_leave_one_whole(key: RankKey) -> None:
    from sllmctl.core.write.target import Target

    model = Tied(1)
    with (
        Target(key.path, fingerprint="other", force=True),
        pytest.raises(ConfigError, match="another conversion"),
    ):
        save_rank_state(key, model, Snapshot.of(model))
    save_rank_state(key, model, Snapshot.of(model))
    load(key, Tied(2))


def test_a_digest_follows_the_bytes_of_a_checkpoint(tmp_path: Path) -> None:
    def put(value: float, *, at_ns: int) -> str:
        tensors = {"a": torch.arange(8.0) + value}
        shard = write_checkpoint(source, {"model.safetensors": tensors}) / "model.safetensors"
        os.utime(shard, ns=(at_ns, at_ns))
        converted = convert(source, tmp_path / "converted", force=True).path
        os.utime(converted / "model.safetensors", ns=(1, 1))
        return checkpoint_digest(open_checkpoint(converted))

    source = tmp_path / "source"
    # Written at the same time, as far as the file says: the conversion's digests tell.
    first, other, again = put(0, at_ns=1), put(1, at_ns=2), put(0, at_ns=3)
    assert first == again != other
    # Without digests the files' own stamps have to do.
    there = checkpoint_digest(open_checkpoint(source))
    assert there.startswith("files:")
    os.utime(source / "model.safetensors", ns=(4, 4))
    assert checkpoint_digest(open_checkpoint(source)) != there


def test_a_shard_that_is_replaced_by_another_changes_the_digest(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(8.0)}
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors})
    path = convert(source, tmp_path / "converted").path
    there = checkpoint_digest(open_checkpoint(path))
    assert there == checkpoint_digest(open_checkpoint(path))
    shard = path / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    (path / "new").write_bytes(content)
    (path / "new").rename(shard)
    # `sllmctl.json` says what it said before.
    assert checkpoint_digest(open_checkpoint(path)) != there


def test_a_conversion_does_not_take_rank_states_along(key: RankKey) -> None:
    write_checkpoint(key.model, {"model.safetensors": {"a": torch.ones(3)}})
    (key.model / "config.json").write_text(json.dumps({}))
    model = Tied()
    save_rank_state(key, model, Snapshot.of(model))
    assert [file.name for file in list_source(key.model).others] == ["config.json"]

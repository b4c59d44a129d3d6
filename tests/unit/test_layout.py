"""The layout rules hold for any set of tensors."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sllmctl.core.checkpoint import natural_key, open_checkpoint
from sllmctl.core.dtypes import DTYPE_BITS
from sllmctl.core.header import parse_header
from sllmctl.core.write.layout import (
    PAGE_BYTES,
    ShardLayout,
    TensorSpec,
    alignment_of,
    format_index,
    plan_shards,
)
from sllmctl.errors import CheckpointError

names = st.text(st.characters(codec="utf-8"), max_size=10).filter(
    lambda name: name not in ("__metadata__", "format")
)


@st.composite
def specs(draw: st.DrawFn) -> list[TensorSpec]:
    found = []
    for name in draw(st.sets(names, max_size=8)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        last = draw(st.sampled_from([8, 64, 1024, 4096]))
        shape = (*shape, last) if DTYPE_BITS[dtype] % 8 else shape
        found.append(TensorSpec(name, dtype, shape, math.prod(shape) * DTYPE_BITS[dtype] // 8))
    return found


def plan(
    tensors: list[TensorSpec], max_shard_bytes: int = 2**34, **texts: str
) -> list[ShardLayout]:
    return plan_shards(tensors, aliases={}, metadata=texts, max_shard_bytes=max_shard_bytes)


def spec(name: str, nbytes: int) -> TensorSpec:
    return TensorSpec(name, "U8", (nbytes,), nbytes)


@given(specs(), st.sampled_from([1, 5000, 9000, 2**34]))
def test_every_byte_belongs_to_one_tensor(tensors: list[TensorSpec], limit: int) -> None:
    shards = plan(tensors, limit)
    found = {}
    for number, shard in enumerate(shards):
        position = len(shard.header)
        assert position % PAGE_BYTES == 0
        for entry in shard.entries:
            assert (entry.shard, entry.offset) == (number, position)
            position += entry.nbytes
            found[entry.name] = TensorSpec(entry.name, entry.dtype, entry.shape, entry.nbytes)
        assert position == shard.size
        assert shard.size <= limit or len(shard.entries) == 1 or not tensors
    assert found == {tensor.name: tensor for tensor in tensors}
    assert len(found) == sum(len(shard.entries) for shard in shards)


@given(specs())
def test_every_tensor_starts_at_its_own_alignment(tensors: list[TensorSpec]) -> None:
    for shard in plan(tensors):
        for entry in shard.entries:
            assert entry.offset % alignment_of(entry.nbytes) == 0
            if DTYPE_BITS[entry.dtype] % 8 == 0:
                assert entry.offset % (DTYPE_BITS[entry.dtype] // 8) == 0


@given(specs())
def test_our_reader_reads_the_header_back(tensors: list[TensorSpec]) -> None:
    for number, shard in enumerate(plan(tensors, 6000, note="text")):
        length = int.from_bytes(shard.header[:8], "little")
        assert length == len(shard.header) - 8
        entries, metadata = parse_header(
            shard.header[8:], shard.size - len(shard.header), "f", shard=number
        )
        placed = [entry for entry in shard.entries if entry.nbytes]
        assert [entry for entry in entries if entry.nbytes] == placed
        assert set(entries) == set(shard.entries)
        assert metadata == {"format": "pt", "note": "text"}


@settings(max_examples=40)
@given(specs(), st.sampled_from([6000, 2**34]))
def test_safetensors_reads_what_we_lay_out(tensors: list[TensorSpec], limit: int) -> None:
    with TemporaryDirectory() as directory:
        shards = plan(tensors, limit)
        for shard in shards:
            path = Path(directory) / shard.name
            path.write_bytes(shard.header.ljust(shard.size, b"\0"))
            with safe_open(path, "pt") as reader:
                assert reader.metadata() == {"format": "pt"}
                assert set(reader.keys()) == {entry.name for entry in shard.entries}
                for entry in shard.entries:
                    assert reader.get_slice(entry.name).get_shape() == list(entry.shape)
                    assert reader.get_slice(entry.name).get_dtype() == entry.dtype
        if len(shards) > 1:
            index = Path(directory) / "model.safetensors.index.json"
            index.write_bytes(format_index(shards))
        assert len(open_checkpoint(Path(directory)).tensors) == len(tensors)


def test_a_shard_is_a_run_of_layers() -> None:
    tensors = [spec(f"layers.{n}.w", 3000) for n in (11, 2, 10, 1, 3, 0)]
    shards = plan(tensors, 4096 + 6000)
    assert [[entry.name for entry in shard.entries] for shard in shards] == [
        ["layers.0.w", "layers.1.w"],
        ["layers.2.w", "layers.3.w"],
        ["layers.10.w", "layers.11.w"],
    ]
    assert [shard.name for shard in shards] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


def test_within_a_shard_the_better_aligned_come_first() -> None:
    tensors = [spec("a", 1), spec("b", 4096), spec("c", 96), spec("d", 8192), spec("e", 0)]
    (shard,) = plan(tensors)
    assert [entry.name for entry in shard.entries] == ["b", "d", "e", "c", "a"]
    assert shard.name == "model.safetensors"


def test_tensors_of_one_alignment_keep_the_order_of_layers() -> None:
    tensors = [spec(f"layers.{n}.w", 4096) for n in (10, 9, 100)]
    (shard,) = plan(tensors)
    found = [entry.name for entry in shard.entries]
    assert found == sorted(found, key=natural_key) == ["layers.9.w", "layers.10.w", "layers.100.w"]


def test_a_tensor_larger_than_a_shard_has_one_of_its_own() -> None:
    shards = plan([spec("a", 10), spec("b", 10**9), spec("c", 10)], 10**6)
    assert [[entry.name for entry in shard.entries] for shard in shards] == [["a"], ["b"], ["c"]]


def test_no_tensors_make_one_empty_shard() -> None:
    (shard,) = plan([])
    assert shard.size == len(shard.header) == PAGE_BYTES


def test_an_alias_lives_in_the_shard_of_its_tensor() -> None:
    shards = plan_shards(
        [spec("a", 4096), spec("b", 4096)],
        aliases={"lm_head": "b"},
        metadata={"format": "np", "note": "x"},
        max_shard_bytes=8192,
    )
    found = [parse_header(s.header[8:], 4096, "f")[1] for s in shards]
    assert found == [
        {"format": "pt", "note": "x"},
        {"format": "pt", "note": "x", "lm_head": "b"},
    ]


def test_the_index_is_in_the_order_of_layers_and_counts_bytes() -> None:
    shards = plan([spec("l.10", 5000), spec("l.9", 5000), spec("l.8", 0)], 9100)
    assert format_index(shards).decode() == (
        '{\n  "metadata": {\n    "total_size": 10000\n  },\n  "weight_map": {\n'
        '    "l.8": "model-00001-of-00002.safetensors",\n'
        '    "l.9": "model-00001-of-00002.safetensors",\n'
        '    "l.10": "model-00002-of-00002.safetensors"\n  }\n}\n'
    )


def test_the_formats_own_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match="reserves the name `__metadata__`"):
        plan([spec("__metadata__", 1)])


def test_metadata_that_fill_a_header_are_refused() -> None:
    with pytest.raises(CheckpointError, match="leave no room in a header"):
        plan([spec("a", 1)], note="x" * 10**8)

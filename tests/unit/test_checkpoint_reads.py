"""What the reader accepts, and what it makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from sllmctl.core.checkpoint import TensorEntry, natural_key, open_checkpoint
from sllmctl.core.dtypes import DTYPE_BITS
from sllmctl.core.header import _scan_canonical, parse_header
from sllmctl.errors import CheckpointError
from tests.conftest import some_tensors, write_checkpoint
from tests.raw import entry, header_bytes, write_raw

U8 = entry("U8", [4], 0, 4)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_reads_every_dtype_that_safetensors_knows(dtype: str, tmp_path: Path) -> None:
    nbytes = DTYPE_BITS[dtype]
    path = write_raw(
        tmp_path / "model.safetensors", {"a": entry(dtype, [8], 0, nbytes)}, bytes(nbytes)
    )
    checkpoint = open_checkpoint(tmp_path)
    shard = checkpoint.shards[0]
    assert checkpoint.tensors == {"a": TensorEntry("a", dtype, (8,), 0, shard.data_offset, nbytes)}
    assert shard.size == path.stat().st_size == shard.data_offset + nbytes
    with safe_open(path, "np") as reader:
        assert reader.get_slice("a").get_dtype() == dtype


@pytest.mark.parametrize(
    ("header", "data", "names"),
    [
        ({}, b"", []),
        (b"{}      ", b"", []),
        (b" {}", b"", []),
        ({"__metadata__": None}, b"", []),
        ({"__metadata__": {"format": "pt"}}, b"", []),
        ({"": entry("U8", [], 0, 1)}, b"\0", [""]),
        ({"é": entry("U8", [], 0, 1)}, b"\0", ["é"]),
        ('{"é":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'.encode(), b"\0", ["é"]),
        ({'a"b\\c': entry("U8", [], 0, 1)}, b"\0", ['a"b\\c']),
        ({"a": {**U8, "note": [1, {"x": 2}]}}, bytes(4), ["a"]),
        ({"b": entry("U8", [2], 2, 4), "a": entry("U8", [2], 0, 2)}, bytes(4), ["a", "b"]),
        (
            {"a": U8, "z": entry("U8", [0], 4, 4), "y": entry("U8", [0, 3], 0, 0)},
            bytes(4),
            ["y", "a", "z"],
        ),
    ],
)
def test_reads_what_safetensors_reads(
    header: Any, data: bytes, names: list[str], tmp_path: Path
) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, data)
    assert list(open_checkpoint(tmp_path).tensors) == names
    with safe_open(path, "np") as reader:
        assert sorted(reader.keys()) == sorted(names)


def test_reads_what_safetensors_writes(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert [shard.path.name for shard in checkpoint.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    expected = {**some_tensors(0), **some_tensors(1)}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        found = checkpoint.tensors[name]
        assert found.shape == tuple(tensor.shape)
        assert found.nbytes == tensor.nbytes
        shard = checkpoint.shards[found.shard]
        if tensor.nbytes:
            stored = shard.path.read_bytes()[found.offset : found.offset + found.nbytes]
            flat = tensor.reshape(-1).view(torch.uint8)
            assert stored == bytes(flat.tolist())
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.manifest is None
    assert checkpoint.aliases == {}


def test_tensors_come_in_file_order(tiny_checkpoint: Path) -> None:
    entries = list(open_checkpoint(tiny_checkpoint).tensors.values())
    assert entries == sorted(entries, key=lambda e: (e.shard, e.offset, e.offset + e.nbytes))


def test_a_directory_without_an_index_is_all_its_files(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, {f"{n}.safetensors": some_tensors(n) for n in (2, 10, 1)}, index=False
    )
    checkpoint = open_checkpoint(tmp_path)
    assert [s.path.name for s in checkpoint.shards] == [
        "1.safetensors",
        "2.safetensors",
        "10.safetensors",
    ]
    assert len(checkpoint.tensors) == 36


def test_the_index_says_which_files_count(tiny_checkpoint: Path) -> None:
    write_raw(tiny_checkpoint / "consolidated.safetensors", {"other": U8}, bytes(4))
    assert "other" not in open_checkpoint(tiny_checkpoint).tensors


def test_the_single_file_goes_before_an_index(tiny_checkpoint: Path) -> None:
    write_raw(tiny_checkpoint / "model.safetensors", {"other": U8}, bytes(4))
    assert list(open_checkpoint(tiny_checkpoint).tensors) == ["other"]


def test_one_file_can_be_opened_by_itself(tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / "model-00002-of-00002.safetensors"
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == path
    assert checkpoint.tensors.keys() == some_tensors(1).keys()


def test_an_index_may_name_files_in_a_folder(tmp_path: Path) -> None:
    write_raw(tmp_path / "parts" / "one.safetensors", {"a": U8}, bytes(4))
    index = {"weight_map": {"a": "parts/one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path).shards[0].path == tmp_path / "parts" / "one.safetensors"


def test_shards_may_be_links_into_a_cache(tiny_checkpoint: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(tiny_checkpoint.glob("*.safetensors")):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert len(open_checkpoint(tiny_checkpoint).tensors) == 24


def test_aliases_follow_the_metadata_convention(tmp_path: Path) -> None:
    metadata = {
        "format": "pt",
        "tied": "a",
        "a": "a",
        "lost": "no such tensor",
        "note": "text",
    }
    write_raw(tmp_path / "model.safetensors", {"__metadata__": metadata, "a": U8}, bytes(4))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.aliases == {"tied": "a"}
    assert checkpoint.metadata == {"a": "a", "lost": "no such tensor", "note": "text"}
    assert list(checkpoint.tensors) == ["a"]


def test_an_alias_holds_within_its_own_file(tmp_path: Path) -> None:
    write_raw(tmp_path / "1.safetensors", {"__metadata__": {"x": "b"}, "a": U8}, bytes(4))
    write_raw(tmp_path / "2.safetensors", {"__metadata__": {"y": "b"}, "b": U8}, bytes(4))
    assert open_checkpoint(tmp_path).aliases == {"y": "b"}


def test_an_index_may_name_an_alias(tmp_path: Path) -> None:
    write_raw(
        tmp_path / "1.safetensors", {"__metadata__": {"lm_head": "embed"}, "embed": U8}, bytes(4)
    )
    index = {"weight_map": {"embed": "1.safetensors", "lm_head": "1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path).aliases == {"lm_head": "embed"}


def test_natural_order_counts_numbers() -> None:
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "a", "layers", "1" * 30, "layers.02.a"]
    assert sorted(names, key=natural_key) == [
        "1" * 30,
        "a",
        "layers",
        "layers.2.a",
        "layers.02.a",
        "layers.2.b",
        "layers.10.a",
    ]


@given(st.text(max_size=12), st.text(max_size=12))
def test_natural_order_compares_any_two_names(one: str, other: str) -> None:
    smaller = natural_key(one) < natural_key(other)
    assert smaller != (natural_key(other) < natural_key(one)) or natural_key(one) == natural_key(
        other
    )


names_strategy = st.text(st.characters(codec="utf-8"), max_size=8).filter(
    lambda name: name != "__metadata__"
)
tensors_strategy = st.dictionaries(
    names_strategy,
    st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 5), max_size=4)),
    max_size=6,
)


def described(tensors: dict[str, tuple[str, list[int]]]) -> tuple[dict[str, Any], int]:
    """A right header for tensors, in the order given, and the size of its data."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits % 8:
            continue
        header[name] = entry(dtype, shape, position, position + bits // 8)
        position += bits // 8
    return header, position


@given(tensors_strategy, st.dictionaries(names_strategy, st.text(max_size=5), max_size=3))
def test_the_scan_of_a_canonical_header_agrees_with_json(
    tensors: dict[str, tuple[str, list[int]]], texts: dict[str, str]
) -> None:
    header, size = described(tensors)
    document = {"__metadata__": texts, **header} if texts else header
    compact = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    spaced = json.dumps(document, indent=1).encode()
    padded = compact.ljust(len(spaced))
    slow, slow_texts = parse_header(spaced, size, "f")
    fast, fast_texts = parse_header(padded, size, "f")
    shift = len(padded) - len(spaced)
    assert [found._replace(offset=found.offset - shift) for found in fast] == slow
    assert fast_texts == slow_texts == texts


@given(tensors_strategy, st.integers(0, 10**6), st.binary(min_size=1, max_size=3))
def test_a_header_with_a_few_bytes_changed_is_right_or_refused(
    tensors: dict[str, tuple[str, list[int]]], place: int, patch: bytes
) -> None:
    header, size = described(tensors)
    text = bytearray(header_bytes(header))
    at = place % len(text)
    text[at : at + len(patch)] = patch
    try:
        entries, _ = parse_header(bytes(text), size, "f")
    except CheckpointError:
        return
    position = 8 + len(text)
    for found in entries:
        assert found.offset == position
        assert found.nbytes * 8 == math.prod(found.shape) * DTYPE_BITS[found.dtype]
        position += found.nbytes
    assert position == 8 + len(text) + size


def test_the_quick_reader_takes_nothing_that_is_no_json() -> None:
    """Every header that is one character away from a canonical one."""
    start = '{"__metadata__":{"format":"pt"},'
    canonical = (
        '"a.b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        '"c\u00e9":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}'
    )
    for text in (start + canonical, "{" + canonical):
        assert _scan_canonical(text.encode(), 13, 0) is not None
        for at in range(len(text)):
            changes = [text[:at] + text[at + 1 :], text[:at] + text[at] + text[at:]]
            for character in '{}[]",:\\ 0a\n\x85':
                changes += [text[:at] + character + text[at:]]
                changes += [text[:at] + character + text[at + 1 :]]
            for changed in changes:
                found = _scan_canonical(changed.encode(), 13, 0)
                if found is None:
                    continue
                document = json.loads(changed)
                document.pop("__metadata__", None)
                assert [one.name for one in found[0]] == list(document)
                for one, info in zip(found[0], document.values(), strict=True):
                    assert info["dtype"] == one.dtype
                    assert tuple(info["shape"]) == one.shape
                    assert info["data_offsets"][1] - info["data_offsets"][0] == one.nbytes

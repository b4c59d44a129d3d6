"""What `docs/reference/format.md` says that a reader refuses, ours does; what it allows is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.header import parse_header
from sllmctl.core.manifest import parse_manifest
from sllmctl.core.write.convert import convert
from sllmctl.errors import CheckpointError, CheckpointNotFound

U8: dict[str, Any] = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
NEXT: dict[str, Any] = {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}


def shard(header: object, data_bytes: int = 4) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


REFUSED_SHARDS = {
    "shorter than 8 bytes": b"\0" * 7,
    "header over the limit": struct.pack("<Q", 100_000_001) + bytes(64),
    "header longer than the file": struct.pack("<Q", 65) + bytes(64),
    "not UTF-8": shard(b'{"\xff": 1}', 0),
    "not JSON": shard(b"{", 0),
    "not an object": shard(b"[]", 0),
    "a key twice": shard(b'{"a": 1, "a": 1}', 0),
    "a key twice, deeper": shard(b'{"__metadata__": {"a": "1", "a": "1"}}', 0),
    "half a surrogate pair": shard({"\ud800": U8}),
    "metadata that are no strings": shard({"__metadata__": {"a": 1}}, 0),
    "no dtype": shard({"a": {"shape": [4], "data_offsets": [0, 4]}}),
    "no shape": shard({"a": {"dtype": "U8", "data_offsets": [0, 4]}}),
    "no offsets": shard({"a": {"dtype": "U8", "shape": [4]}}),
    "unknown dtype": shard({"a": U8 | {"dtype": "U9"}}),
    "shape of no integers": shard({"a": U8 | {"shape": [4.0]}}),
    "shape of 65 axes": shard({"a": U8 | {"shape": [1] * 64 + [4]}}),
    "negative axis": shard({"a": U8 | {"shape": [-4]}}),
    "axis past 2^63": shard({"a": U8 | {"shape": [0, 2**63], "data_offsets": [0, 0]}}, 0),
    "huge axes hidden by a zero": shard(
        {"a": U8 | {"shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}, 0
    ),
    "half a byte": shard({"a": {"dtype": "F4", "shape": [7], "data_offsets": [0, 4]}}),
    "offsets of no integers": shard({"a": U8 | {"data_offsets": [0, "4"]}}),
    "a size that contradicts the offsets": shard({"a": U8 | {"shape": [3]}}),
    "a hole": shard({"a": U8, "b": NEXT | {"data_offsets": [5, 9]}}, 9),
    "an overlap": shard({"a": U8, "b": NEXT | {"data_offsets": [3, 7]}}, 7),
    "bytes after the last tensor": shard({"a": U8}, 5),
    "a truncated file": shard({"a": U8}, 3),
}


@pytest.mark.parametrize("what", REFUSED_SHARDS)
def test_a_shard_is_refused_with(what: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "model", {"model.safetensors": REFUSED_SHARDS[what]})
    with pytest.raises(CheckpointError):
        open_checkpoint(directory)


def test_a_large_header_of_brackets_alone_is_refused() -> None:
    with pytest.raises(CheckpointError, match="too many containers"):
        parse_header(b'{"a":' + b"[" * 2**20 + b"]" * 2**20 + b"}", 0, "file")


ALLOWED_SHARDS = {
    "no tensors": shard({}, 0),
    "spaces around the header": shard(b'{"a":' + json.dumps(U8).encode() + b"}" + b" " * 9),
    "other keys of a tensor": shard({"a": U8 | {"comment": [1]}}),
    "tensors in any order": shard({"b": NEXT, "a": U8}, 8),
    "an empty tensor": shard({"a": U8, "b": U8 | {"shape": [0, 9], "data_offsets": [4, 4]}}),
    "a scalar": shard({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}),
    "F4 in pairs": shard({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}),
}


@pytest.mark.parametrize("what", ALLOWED_SHARDS)
def test_a_shard_is_read_with(what: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "model", {"model.safetensors": ALLOWED_SHARDS[what]})
    open_checkpoint(directory)


TWO = {"a.safetensors": shard({"a": U8}), "b.safetensors": shard({"b": U8})}
REFUSED_INDEXES: dict[str, object] = {
    "no weight_map": {},
    "a name that is no text": {"weight_map": {"a": 1}},
    "an absolute name": {"weight_map": {"a": "/a.safetensors"}},
    "a name that leads out": {"weight_map": {"a": "../model/a.safetensors"}},
    "an empty name": {"weight_map": {"a": ""}},
    "a NUL": {"weight_map": {"a": "a\0"}},
    "a missing file": {"weight_map": {"a": "c.safetensors"}},
    "a missing tensor": {"weight_map": {"c": "a.safetensors"}},
    "a tensor of another shard": {"weight_map": {"b": "a.safetensors", "a": "b.safetensors"}},
}


@pytest.mark.parametrize("what", REFUSED_INDEXES)
def test_an_index_is_refused_with(what: str, tmp_path: Path) -> None:
    index = json.dumps(REFUSED_INDEXES[what]).encode()
    directory = write(tmp_path / "model", {**TWO, "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError):
        open_checkpoint(directory)


def test_shards_are_chosen_as_the_page_says(tmp_path: Path) -> None:
    def names(files: dict[str, bytes]) -> list[str]:
        directory = write(tmp_path / str(len(list(tmp_path.iterdir()))), files)
        return [shard.path.name for shard in open_checkpoint(directory).shards]

    def index(*names: str) -> bytes:
        return json.dumps({"weight_map": {name[0]: name for name in names}}).encode()

    single = {"model.safetensors": shard({"s": U8})}
    usual = {"model.safetensors.index.json": index("a.safetensors")}
    other = {"other.safetensors.index.json": index("b.safetensors")}
    third = {"third.safetensors.index.json": index("b.safetensors")}
    assert names({**TWO, **single, **usual}) == ["model.safetensors"]
    assert names({**TWO, **usual, **other}) == ["a.safetensors"]
    assert names({**TWO, **other}) == ["b.safetensors"]
    assert names(TWO) == ["a.safetensors", "b.safetensors"]
    with pytest.raises(CheckpointError, match="2 indexes"):
        names({**TWO, **other, **third})
    with pytest.raises(CheckpointNotFound):
        names({"config.json": b"{}"})


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", {**TWO, "c.safetensors": TWO["a.safetensors"]})
    with pytest.raises(CheckpointError, match="in two shards"):
        open_checkpoint(directory)


def test_metadata_are_aliases_when_the_page_says_so(tmp_path: Path) -> None:
    claims = {"tied": "a", "far": "b", "format": "a", "author": "someone", "b": "a"}
    files = {
        "a.safetensors": shard({"__metadata__": claims, "a": U8}),
        "b.safetensors": shard({"b": U8}),
    }
    assert open_checkpoint(write(tmp_path / "model", files)).aliases == {"tied": "a"}


REFUSED_MANIFESTS: dict[str, dict[str, Any]] = {
    "a later version": {"format_version": 2},
    "another version": {"format_version": 0},
    "another digest": {"digest": "crc32"},
    "no chunks": {"chunk_bytes": 0},
    "more chunks than its digests": {"chunk_bytes": 1},
    "a field of another type": {"shards": {}},
    "a field missing": {"tool": None},
}


def sign(document: dict[str, Any]) -> bytes:
    document.pop("manifest_digest", None)
    canonical = json.dumps(document, separators=(",", ":"), sort_keys=True)
    signed = {**document, "manifest_digest": xxhash.xxh3_128_hexdigest(canonical.encode())}
    return json.dumps(signed).encode()


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    source = write(tmp_path / "source", {"model.safetensors": shard({"a": U8})})
    target = convert(source, tmp_path / "target").path
    document: dict[str, Any] = json.loads((target / "sllmctl.json").read_text())
    return document


@pytest.mark.parametrize("what", REFUSED_MANIFESTS)
def test_a_manifest_is_refused_with(what: str, manifest: dict[str, Any]) -> None:
    changes = REFUSED_MANIFESTS[what]
    changed = {k: v for k, v in (manifest | changes).items() if v is not None}
    with pytest.raises(CheckpointError):
        parse_manifest(sign(changed), "file")


def test_a_manifest_that_was_changed_is_refused(manifest: dict[str, Any]) -> None:
    assert parse_manifest(json.dumps(manifest).encode(), "file").tensors == 1
    with pytest.raises(CheckpointError, match="does not match its own digest"):
        parse_manifest(json.dumps(manifest | {"tensors": 2}).encode(), "file")


def test_a_manifest_may_have_further_fields(manifest: dict[str, Any]) -> None:
    assert parse_manifest(sign(manifest | {"later": ["ü", 1]}), "file").tensors == 1

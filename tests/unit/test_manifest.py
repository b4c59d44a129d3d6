"""The manifest says the same after a round trip, and a damaged one is never believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.manifest import (
    CHUNK_BYTES,
    FileDigest,
    Manifest,
    Origin,
    ShardDigest,
    format_manifest,
    parse_manifest,
    read_manifest,
    shard_digest,
)
from sllmctl.errors import CheckpointError
from tests.raw import write_raw

CHUNKS = bytes(range(32))
MANIFEST = Manifest(
    tool="sllmctl 1.2",
    origin=Origin(hub="huggingface", name="org/模型", revision="0" * 40),
    dtype="keep",
    fingerprint="ab" * 16,
    tensors=3,
    bytes=1000,
    shards=(ShardDigest("model.safetensors", CHUNK_BYTES + 1, shard_digest(CHUNKS), CHUNKS.hex()),),
    files=(FileDigest("sub/config.json", 7, "cd" * 16),),
)


def test_a_manifest_survives_a_round_trip() -> None:
    assert parse_manifest(format_manifest(MANIFEST), "f") == MANIFEST


def test_chunk_digests_are_found_by_number() -> None:
    assert MANIFEST.shards[0].chunk_digest(0) == CHUNKS[:16]
    assert MANIFEST.shards[0].chunk_digest(1) == CHUNKS[16:]


def test_every_flipped_bit_is_noticed() -> None:
    raw = format_manifest(MANIFEST)
    for place in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(CheckpointError, match="damaged manifest|format version"):
            parse_manifest(bytes(flipped), "sllmctl.json")


def test_a_later_format_asks_for_an_upgrade() -> None:
    document = json.loads(format_manifest(MANIFEST))
    document["format_version"] = 2
    with pytest.raises(CheckpointError, match="has format version 2; this sllmctl reads up to 1"):
        parse_manifest(json.dumps(document).encode(), "f")


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"null", b"\xff", b"[" * 100_000, b'{"format_version": true}']
)
def test_nonsense_is_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged manifest `f`"):
        parse_manifest(raw, "f")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../b", "", "a\0b"])
def test_names_that_lead_out_are_refused(name: str) -> None:
    shard = MANIFEST.shards[0]
    bad = Manifest(
        **{
            **{f: getattr(MANIFEST, f) for f in MANIFEST.__slots__},
            "shards": (ShardDigest(name, shard.size, shard.digest, shard.chunks),),
        }
    )
    with pytest.raises(CheckpointError, match="bad or missing field"):
        parse_manifest(format_manifest(bad), "f")


def test_too_few_chunk_digests_are_refused() -> None:
    shard = MANIFEST.shards[0]
    bad = Manifest(
        **{
            **{f: getattr(MANIFEST, f) for f in MANIFEST.__slots__},
            "shards": (ShardDigest(shard.name, shard.size, shard.digest, shard.chunks[:32]),),
        }
    )
    with pytest.raises(CheckpointError, match="needs 2 chunk digests"):
        parse_manifest(format_manifest(bad), "f")


def test_a_directory_without_one_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_opening_a_checkpoint_with_a_damaged_manifest_names_it(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {})
    (tmp_path / "sllmctl.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged manifest `.*sllmctl.json`"):
        open_checkpoint(tmp_path)

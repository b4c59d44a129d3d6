"""`sllmctl.json`: what a conversion records about the checkpoint that it wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import xxhash

from sllmctl.core.fileio import read_file
from sllmctl.core.header import one_line
from sllmctl.errors import CheckpointError

MANIFEST_NAME = "sllmctl.json"
FORMAT_VERSION = 1
DIGEST_NAME = "xxh3-128"
CHUNK_BYTES = 16 * 2**20
"""Digests are taken per chunk of this many bytes of a shard, counted from the file's start."""

DIGEST_BYTES = 16
_SELF_DIGEST = "manifest_digest"
_MAX_MANIFEST_BYTES = 64 * 2**20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint came from: a directory, or a revision of a hub's repository."""

    path: str | None = None
    hub: str | None = None
    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class ShardDigest:
    """One shard: its name, its size in bytes, and its digests in hexadecimal.

    ``chunks`` holds 32 digits a chunk; ``digest`` is that of the chunk digests' bytes.
    """

    name: str
    size: int
    digest: str
    chunks: str

    def chunk_digest(self, index: int) -> bytes:
        """Return the digest of chunk ``index``, 16 bytes."""
        start = index * 2 * DIGEST_BYTES
        return bytes.fromhex(self.chunks[start : start + 2 * DIGEST_BYTES])


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file beside the shards: its path below the checkpoint, size in bytes, and digest."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest. ``fingerprint`` identifies source and options of the conversion."""

    tool: str
    origin: Origin
    dtype: str
    fingerprint: str
    tensors: int
    bytes: int
    shards: tuple[ShardDigest, ...]
    files: tuple[FileDigest, ...]
    chunk_bytes: int = CHUNK_BYTES


def shard_digest(chunk_digests: bytes) -> str:
    """Return a shard's digest, in hexadecimal, from its chunks' digests (16 bytes each)."""
    return xxhash.xxh3_128_hexdigest(chunk_digests)


def format_manifest(manifest: Manifest) -> bytes:
    """Write a manifest as JSON that carries its own digest."""
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tool": manifest.tool,
        "source": asdict(manifest.origin),
        "dtype": manifest.dtype,
        "fingerprint": manifest.fingerprint,
        "tensors": manifest.tensors,
        "bytes": manifest.bytes,
        "digest": DIGEST_NAME,
        "chunk_bytes": manifest.chunk_bytes,
        "shards": [asdict(shard) for shard in manifest.shards],
        "files": [asdict(file) for file in manifest.files],
    }
    document[_SELF_DIGEST] = _document_digest(document)
    # Unescaped: the case of an escape's digits would be a bit that no digest sees.
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest of a checkpoint directory; None where there is none.

    Raises:
        CheckpointError: It is damaged, or of a later format version.
    """
    path = directory / MANIFEST_NAME
    return parse_manifest(read_file(path), str(path)) if os.path.lexists(path) else None


def parse_manifest(raw: bytes, file: str) -> Manifest:
    """Parse the bytes of a manifest; ``file`` names it in errors.

    Raises:
        CheckpointError: It is damaged, or of a later format version.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"damaged manifest `{file}`: {one_line(what)}",
            hint="convert the model again with --force",
        )

    if len(raw) > _MAX_MANIFEST_BYTES:
        raise refuse(f"{len(raw)} bytes is too large for a manifest")
    try:
        document = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise refuse(f"not JSON ({exc})") from exc
    if not isinstance(document, dict):
        raise refuse("not a JSON object")
    version = document.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"`{file}` has format version {one_line(version)}; "
            f"this sllmctl reads up to {FORMAT_VERSION}",
            hint="upgrade sllmctl",
        )
    if version != FORMAT_VERSION or document.get("digest") != DIGEST_NAME:
        raise refuse("unknown format version or digest")
    expected = document.pop(_SELF_DIGEST, None)
    if expected != _document_digest(document):
        raise refuse("its content does not match its own digest")
    try:
        manifest = Manifest(
            tool=_text(document["tool"]),
            origin=Origin(
                **{f.name: _optional_text(document["source"][f.name]) for f in fields(Origin)}
            ),
            dtype=_text(document["dtype"]),
            fingerprint=_text(document["fingerprint"]),
            tensors=_count(document["tensors"]),
            bytes=_count(document["bytes"]),
            shards=_tuple(document["shards"], _shard),
            files=_tuple(document["files"], _file),
            chunk_bytes=_count(document["chunk_bytes"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise refuse(f"bad or missing field ({exc})") from exc
    if manifest.chunk_bytes == 0:
        raise refuse("chunk_bytes is 0")
    for shard in manifest.shards:
        chunks = -(-shard.size // manifest.chunk_bytes)
        if len(shard.chunks) != chunks * 2 * DIGEST_BYTES:
            raise refuse(f"`{shard.name}` needs {chunks} chunk digests")
    return manifest


def _document_digest(document: dict[str, Any]) -> str:
    canonical = json.dumps(document, separators=(",", ":"), sort_keys=True)
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text expected, not {value!r}")
    return value


def _name(value: Any) -> str:
    path = PurePosixPath(_text(value))
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in value:
        raise ValueError(f"{value!r} is no file of the checkpoint")
    return _text(value)


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"count expected, not {value!r}")
    return value


def _hex(value: Any) -> str:
    bytes.fromhex(_text(value))
    return _text(value)


def _tuple(value: Any, parse: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise TypeError(f"list expected, not {value!r}")
    return tuple(parse(item) for item in value)


def _shard(value: Any) -> ShardDigest:
    return ShardDigest(
        _name(value["name"]), _count(value["size"]), _hex(value["digest"]), _hex(value["chunks"])
    )


def _file(value: Any) -> FileDigest:
    return FileDigest(_name(value["name"]), _count(value["size"]), _hex(value["digest"]))

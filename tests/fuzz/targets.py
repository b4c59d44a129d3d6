"""What is fuzzed: each target takes any bytes, and fails only by raising something unforeseen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, deserialize

from sllmctl.core import header as header_module
from sllmctl.core import manifest as manifest_module
from sllmctl.core.dtypes import DTYPE_BITS
from sllmctl.errors import CheckpointError
from tests.fuzz import doctor, session
from tests.fuzz import sllm_index as sllm_index_module
from tests.raw import entry

Target = Callable[[bytes], None]
REGRESS = Path(__file__).parents[1] / "data" / "regress"
_ORACLE_BYTES = 2**16


def header(data: bytes) -> None:
    """A file: its first 8 bytes are the length of a header, as in safetensors.

    Whatever we accept covers its data exactly, and safetensors accepts it as well.
    """
    try:
        length = header_module.parse_prefix(data[:8], len(data), "f")
        text = data[8 : 8 + length]
        data_bytes = len(data) - 8 - length
        entries, metadata = header_module.parse_header(text, data_bytes, "f")
    except CheckpointError as exc:
        _check_message(exc)
        return
    position = 8 + length
    for found in entries:
        assert found.offset == position
        assert found.nbytes * 8 == math.prod(found.shape) * DTYPE_BITS[found.dtype]
        found.name.encode()
        position += found.nbytes
    assert position == len(data)
    assert all(isinstance(value, str) for value in metadata.values())
    if len(data) <= _ORACLE_BYTES and not _has_more_than_tensors(text):
        try:
            theirs = dict(deserialize(data))
        except SafetensorError as exc:
            raise AssertionError(f"safetensors refuses what we accept: {exc}") from exc
        assert theirs.keys() == {found.name for found in entries}
        for found in entries:
            assert tuple(theirs[found.name]["shape"]) == found.shape
            assert theirs[found.name]["dtype"] == found.dtype


def index(data: bytes) -> None:
    """The index of a sharded checkpoint: names stay beneath its directory."""
    try:
        weight_map = header_module.parse_index(data, "f")
    except CheckpointError as exc:
        _check_message(exc)
        return
    for name, shard in weight_map.items():
        name.encode()
        assert not Path(shard).is_absolute()
        assert ".." not in Path(shard).parts
        assert "\0" not in shard


def manifest(data: bytes) -> None:
    """The manifest: what is accepted writes the same again."""
    try:
        found = manifest_module.parse_manifest(data, "f")
    except CheckpointError as exc:
        _check_message(exc)
        return
    assert manifest_module.parse_manifest(manifest_module.format_manifest(found), "f") == found


def sllm_index(data: bytes) -> None:
    """The index of sllm-store, beside data files of various sizes."""
    results = [sllm_index_module.accepted(data, sizes) for sizes in sllm_index_module.SIZES]
    refused = [result for result in results if isinstance(result, CheckpointError)]
    if len(refused) == len(results):
        _check_message(refused[0])


TARGETS: dict[str, Target] = {
    "header": header,
    "index": index,
    "manifest": manifest,
    "doctor": doctor.doctor,
    "session": session.session,
    "sllm_index": sllm_index,
}


def seeds(target: str) -> list[bytes]:
    """Right inputs to start from."""
    if target == "session":
        return session.seeds()
    if target == "sllm_index":
        return sllm_index_module.seeds()
    if target == "doctor":
        return doctor.seeds()
    if target == "index":
        return [
            json.dumps({"metadata": {"total_size": 8}, "weight_map": names}).encode()
            for names in (
                {"a": "model-00001-of-00002.safetensors", "b": "sub/x.safetensors"},
                {"é": "x", "a\\b": "./y"},
            )
        ]
    if target == "manifest":
        return [
            manifest_module.format_manifest(
                manifest_module.Manifest(
                    tool="sllmctl 0.1.0",
                    origin=manifest_module.Origin(hub="huggingface", name="a/b", revision="c"),
                    dtype="keep",
                    fingerprint="00",
                    tensors=1,
                    bytes=2,
                    shards=(
                        manifest_module.ShardDigest("model.safetensors", 9, "ab" * 16, "cd" * 16),
                    ),
                    files=(manifest_module.FileDigest("config.json", 3, "ef" * 16),),
                )
            )
        ]
    headers: list[tuple[object, int]] = [
        ({}, 0),
        ({"__metadata__": {"format": "pt", "tied": "a"}, "a": entry("BF16", [2, 3], 0, 12)}, 12),
        (
            {
                "b": entry("F4", [4], 2, 4),
                "a": entry("U8", [2], 0, 2),
                "z": entry("F64", [0], 4, 4),
            },
            4,
        ),
        ({"é\n": entry("I64", [], 0, 8), "x": {**entry("BOOL", [1, 1], 8, 9), "more": [1.5]}}, 9),
        ({f"layers.{n}.w": entry("F8_E4M3", [4], 4 * n, 4 * n + 4) for n in range(5)}, 20),
    ]
    found = []
    for document, size in headers:
        for separators in ((",", ":"), (", ", ": ")):
            text = json.dumps(document, separators=separators).encode()
            found.append(len(text).to_bytes(8, "little") + text + bytes(size))
    return found


def regressions(target: str) -> list[Path]:
    """Inputs that once failed."""
    return sorted((REGRESS / target).glob("*"))


def _check_message(exc: CheckpointError) -> None:
    message = str(exc)
    assert "\n" not in message
    assert len(message) < 2000
    message.encode()


def _has_more_than_tensors(text: bytes) -> bool:
    """Whether a header has keys that nobody reads, in which we and safetensors may differ."""
    document = json.loads(text)
    return any(len(info) != 3 for name, info in document.items() if name != "__metadata__")

"""Where tensors go in the shards that we write: pure arithmetic on names and sizes.

Rules, in this order: a shard is a run of layers; its data starts at a page; inside it, tensors
whose size a larger power of two divides come first, so that each starts at a multiple of the
largest power of two, up to a page, that divides its own size. Safetensors allows no padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sllmctl.core.checkpoint import SINGLE_NAME, TensorEntry, natural_key
from sllmctl.core.header import MAX_HEADER_BYTES, METADATA_KEY, PREFIX_BYTES
from sllmctl.errors import CheckpointError

PAGE_BYTES = 4096
DEFAULT_SHARD_BYTES = 16 * 2**30
_ENTRY_TEXT_BYTES = 120
"""Upper bound of an entry's text beside its name and shape: dtype, offsets, punctuation."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: safetensors code, shape as the file states it, size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One file to be written.

    Attributes:
        name: File name.
        header: The file's bytes before the data section: length and padded JSON.
        entries: Tensors in file order; offsets count from the start of the file.
        size: Size of the file in bytes.
    """

    name: str
    header: bytes
    entries: tuple[TensorEntry, ...]
    size: int


def plan_shards(
    tensors: Iterable[TensorSpec],
    *,
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    single_name: str = SINGLE_NAME,
) -> list[ShardLayout]:
    """Distribute tensors over shards and place them.

    Args:
        tensors: In any order; names are unique.
        aliases: Tied name to the name of a tensor that is stored.
        metadata: Goes into every shard.
        max_shard_bytes: A file is no larger, unless it holds a single tensor that is.
        single_name: Name of the file if it is the only one.

    Returns:
        At least one shard, named as Hugging Face names them.

    Raises:
        CheckpointError: A name is one that the format keeps for itself, or the metadata leave no
            room in a header.
    """
    tensors = sorted(tensors, key=_by_layer)
    if METADATA_KEY in aliases or any(spec.name == METADATA_KEY for spec in tensors):
        raise CheckpointError(f"safetensors reserves the name `{METADATA_KEY}`")
    aliases_of: dict[str, dict[str, str]] = {}
    for alias, kept in aliases.items():
        aliases_of.setdefault(kept, {})[alias] = kept
    shared = {"format": "pt", **{k: v for k, v in metadata.items() if k != "format"}}
    groups = list(_fill(tensors, aliases_of, _text_bytes(shared), max_shard_bytes))
    shards = []
    for number, group in enumerate(groups, start=1):
        name = single_name
        if len(groups) > 1:
            name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        texts = dict(shared)
        for spec in group:
            texts |= aliases_of.get(spec.name, {})
        shards.append(_place(name, number - 1, group, texts))
    return shards


def alignment_of(nbytes: int) -> int:
    """Return the largest power of two up to a page that divides a size; a page for 0."""
    return min(nbytes & -nbytes, PAGE_BYTES) or PAGE_BYTES


def format_index(shards: Sequence[ShardLayout]) -> bytes:
    """Write the index of a sharded checkpoint, as transformers does."""
    entries = sorted((e for shard in shards for e in shard.entries), key=_by_layer)
    document = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": {entry.name: shards[entry.shard].name for entry in entries},
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _by_layer(tensor: TensorSpec | TensorEntry) -> tuple[tuple[tuple[int, int, str], ...], str]:
    return natural_key(tensor.name), tensor.name


def _text_bytes(texts: Mapping[str, str]) -> int:
    return len(json.dumps(texts, ensure_ascii=False).encode())


def _fill(
    tensors: Sequence[TensorSpec],
    aliases_of: Mapping[str, Mapping[str, str]],
    shared_bytes: int,
    max_shard_bytes: int,
) -> Iterator[list[TensorSpec]]:
    """Cut a sequence of tensors where a file would grow past its limits."""
    start_bytes = shared_bytes + 64
    group: list[TensorSpec] = []
    header_bytes, data_bytes = start_bytes, 0
    for spec in tensors:
        text_bytes = _ENTRY_TEXT_BYTES + _text_bytes({spec.name: ""}) + 22 * len(spec.shape)
        text_bytes += _text_bytes(aliases_of.get(spec.name, {}))
        if start_bytes + text_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"metadata of {shared_bytes} bytes leave no room in a header, "
                f"which may take {MAX_HEADER_BYTES}"
            )
        size = _round_up(header_bytes + text_bytes) + data_bytes + spec.nbytes
        if group and (
            size > max_shard_bytes or header_bytes + text_bytes + PAGE_BYTES > MAX_HEADER_BYTES
        ):
            yield group
            group, header_bytes, data_bytes = [], start_bytes, 0
        group.append(spec)
        header_bytes += text_bytes
        data_bytes += spec.nbytes
    yield group


def _place(
    name: str, shard: int, group: Sequence[TensorSpec], metadata: Mapping[str, str]
) -> ShardLayout:
    # The sort is stable: layers stay in order among tensors of one alignment.
    specs = sorted(group, key=lambda spec: -alignment_of(spec.nbytes))
    ends = list(accumulate(spec.nbytes for spec in specs))
    begins = [0, *ends[:-1]]
    document: dict[str, object] = {METADATA_KEY: metadata}
    for spec, begin, end in zip(specs, begins, ends, strict=False):
        document[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    base = _round_up(PREFIX_BYTES + len(text))
    text = text.ljust(base - PREFIX_BYTES)
    entries = tuple(
        TensorEntry(spec.name, spec.dtype, spec.shape, shard, base + begin, spec.nbytes)
        for spec, begin in zip(specs, begins, strict=False)
    )
    header = len(text).to_bytes(PREFIX_BYTES, "little") + text
    return ShardLayout(name, header, entries, base + (ends[-1] if ends else 0))


def _round_up(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES

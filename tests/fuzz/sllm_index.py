"""sllm-store's index: whatever is accepted lies in its files, and says how."""

from __future__ import annotations

import json
import math

from sllmctl.core import sllm_store
from sllmctl.core.dtypes import DTYPE_BITS, torch_shape
from sllmctl.errors import CheckpointError

SIZES: tuple[tuple[int, ...], ...] = ((4096,), (64, 64), (0,), (32, 0, 96), (8, 8, 8, 4096))
"""Of the data files; each input is read with all of them."""


def accepted(data: bytes, sizes: tuple[int, ...]) -> sllm_store.Placed | CheckpointError:
    """What is made of an index, which is right as far as it can be told."""
    try:
        placed = sllm_store.parse_sllm_index(data, sizes, "f")
    except CheckpointError as exc:
        message = str(exc)
        assert "\n" not in message
        assert len(message.encode()) < 4000
        return exc
    names = {entry.name for entry in placed.entries}
    assert len(names) == len(placed.entries)
    assert names.isdisjoint(placed.aliases)
    assert names.issuperset(placed.aliases.values())
    assert names.issuperset((*placed.strides, *placed.parts))
    assert names | placed.aliases.keys() == json.loads(data).keys()
    position = (0, 0, 0)
    for found in placed.entries:
        found.name.encode()
        assert 0 <= found.offset <= found.offset + found.nbytes <= sizes[found.shard]
        here = found.shard, found.offset, found.offset + found.nbytes
        assert position <= here
        assert position[0] < here[0] or position[2] <= here[2]
        position = here
        bits = math.prod(found.shape) * DTYPE_BITS[found.dtype]
        stride = placed.strides.get(found.name)
        if stride is None:
            assert found.nbytes * 8 == bits
        else:
            shape = torch_shape(found.dtype, found.shape)
            last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            assert found.nbytes * 8 == (last + 1) * max(8, DTYPE_BITS[found.dtype])
    return placed


def seeds() -> list[bytes]:
    """Right indexes for one of the lists of sizes."""
    documents: list[dict[str, object]] = [
        {},
        {"a": [0, 12, [2, 3], [3, 1], "torch.bfloat16"], "b": [16, 1, [], [], "torch.bool"]},
        {
            "a": [0, 64, [4, 2], [1, 4], "torch.float64"],
            "tied": [0, 64, [4, 2], [1, 4], "torch.float64"],
            "view": [0, 64, [8], [1], "torch.float64"],
            "wide": [64, 8, [5, 1], [0, 9], "torch.int64"],
            "none": [0, 0, [0, 3], [3, 1], "torch.float16"],
        },
        {
            "a": [0, 8, [4], [1], "torch.float16"],
            "b": [8, 8, [8], [1], "torch.float4_e2m1fn_x2"],
            "c": [16, 8, [2], [1], "torch.float32"],
            "d\u00e9": [24, 512, [3], [1], "torch.uint8"],
        },
        {f"layers.{n}": [8 * n, 6, [3, 1], [1, 1], "torch.int16"] for n in range(4)},
    ]
    compact = [json.dumps(document, separators=(",", ":")).encode() for document in documents]
    return [*compact, *(json.dumps(document).encode() for document in documents)]

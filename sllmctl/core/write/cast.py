"""Change the dtype of a checkpoint's weights while they are converted."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sllmctl.core.dtypes import CAST_CODES, DTYPE_BITS, FLOAT_CODES, torch_dtype
from sllmctl.core.fileio import Buffer, thread_buffer
from sllmctl.core.header import shown
from sllmctl.core.write.layout import TensorSpec
from sllmctl.core.write.sources import Weights
from sllmctl.core.write.writer import ByteSource
from sllmctl.errors import ConfigError

_STEP_ELEMENTS = 2**20
_CONFIG_KEYS = ("dtype", "torch_dtype")
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class Cast:
    """A cast of all tensors of a checkpoint's main floating dtype.

    Attributes:
        weights: The weights after the cast.
        cast_from: Safetensors code of the main dtype; None when nothing is cast.
    """

    def __init__(
        self, weights: Weights, dtype: str, config: dict[str, Any], keep: Callable[[str], bool]
    ) -> None:
        """Plan a cast.

        Args:
            weights: What is to be cast.
            dtype: ``bfloat16``, ``float16`` or ``float32``.
            config: The model's ``config.json``; empty when there is none.
            keep: Tells by a tensor's name that it stays as it is.

        Raises:
            ConfigError: The checkpoint is quantized.
        """
        self._to = CAST_CODES[dtype]
        self._lock = threading.Lock()
        self._overflows: Counter[str] = Counter()
        if _is_quantized(config):
            raise ConfigError(
                "the checkpoint is quantized (config.json has `quantization_config`): "
                f"it cannot be cast to {dtype}",
                hint="convert it with --dtype keep",
            )
        self.cast_from = _main_dtype(weights.tensors)
        self.weights = weights
        if self.cast_from is None or self.cast_from == self._to:
            self.cast_from = None
            return
        tensors = []
        sources = dict(weights.sources)
        for spec in weights.tensors:
            if spec.dtype != self.cast_from or keep(spec.name):
                tensors.append(spec)
                continue
            nbytes = spec.nbytes * DTYPE_BITS[self._to] // DTYPE_BITS[self.cast_from]
            tensors.append(TensorSpec(spec.name, self._to, spec.shape, nbytes))
            source, offset = weights.sources[spec.name]
            sources[spec.name] = _CastBytes(self, spec.name, source, offset, spec.dtype), 0
        self.weights = replace(weights, tensors=tensors, sources=sources)

    @property
    def code(self) -> str:
        """Safetensors code of the result."""
        return self._to

    def rewrite_config(self, config: dict[str, Any]) -> bytes | None:
        """Return ``config.json`` with its dtype keys rewritten; None if none changes."""
        if self.cast_from is None:
            return None
        name = _TORCH_NAMES[self._to]
        changed = _rename_dtype(config, _TORCH_NAMES[self.cast_from], name)
        for key in _CONFIG_KEYS:
            if isinstance(config.get(key), str) and config[key] != name:
                changed = {**changed, key: name}
        if changed == config:
            return None
        return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()

    def warnings(self) -> tuple[str, ...]:
        """Say what the cast lost. Complete when everything is written."""
        if not self._overflows:
            return ()
        worst, count = self._overflows.most_common(1)[0]
        return (
            f"{self._overflows.total()} values of {len(self._overflows)} tensors are too large for "
            f"{_TORCH_NAMES[self._to]} and became infinite, {count} of them in {shown(worst)}",
        )

    def count_overflows(self, name: str, count: int) -> None:
        """Note that finite values of a tensor became infinite. Any thread may."""
        with self._lock:
            self._overflows[name] += count


class _CastBytes:
    """The bytes of one tensor after the cast, computed piece by piece as they are asked for."""

    def __init__(
        self, cast: Cast, name: str, source: ByteSource, offset: int, from_code: str
    ) -> None:
        self._cast = cast
        self._name = name
        self._source = source
        self._offset = offset
        self._from = torch_dtype(from_code)
        self._to = torch_dtype(cast.code)

    def read_into(self, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        """Fill ``nbytes`` of a buffer from ``position`` on with the bytes at ``offset``."""
        import torch

        for start in range(0, nbytes // self._to.itemsize, _STEP_ELEMENTS):
            count = min(_STEP_ELEMENTS, nbytes // self._to.itemsize - start)
            first = offset // self._to.itemsize + start
            raw = thread_buffer("cast", count * self._from.itemsize)
            self._source.read_into(
                self._offset + first * self._from.itemsize, raw, 0, count * self._from.itemsize
            )
            before = torch.frombuffer(raw.view, dtype=self._from, count=count)
            after = torch.frombuffer(
                buffer.view,
                dtype=self._to,
                count=count,
                offset=position + start * self._to.itemsize,
            )
            after.copy_(before)
            if self._to is torch.float16 or self._from.itemsize == 8:
                lost = int(after.isinf().sum()) - int(before.isinf().sum())
                if lost:
                    self._cast.count_overflows(self._name, lost)


def _is_quantized(config: Any) -> bool:
    """Whether a configuration, or that of a part such as ``text_config``, tells of quantization."""
    if not isinstance(config, dict):
        return False
    return config.get("quantization_config") is not None or any(map(_is_quantized, config.values()))


def _main_dtype(tensors: list[TensorSpec]) -> str | None:
    """The plain floating dtype that holds most bytes."""
    sizes: Counter[str] = Counter()
    for spec in tensors:
        if spec.dtype in FLOAT_CODES:
            sizes[spec.dtype] += spec.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _rename_dtype(value: Any, old: str, new: str) -> Any:
    if isinstance(value, list):
        return [_rename_dtype(item, old, new) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: new
        if key in _CONFIG_KEYS and item in (old, f"torch.{old}")
        else _rename_dtype(item, old, new)
        for key, item in value.items()
    }

"""The bytes of torch tensors, piece by piece: of any device, any strides, any size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sllmctl.core.dtypes import dtype_code, stored_shape
from sllmctl.core.fileio import Buffer
from sllmctl.core.header import is_unicode, shown
from sllmctl.core.manifest import CHUNK_BYTES
from sllmctl.core.write.layout import TensorSpec
from sllmctl.core.write.sources import Weights
from sllmctl.core.write.writer import ByteSource
from sllmctl.errors import CheckpointError

if TYPE_CHECKING:
    import torch


_STRIDED_BYTES = 4 * 2**20
"""Copied at a time of a tensor that is not contiguous; several threads do so at once."""


class TensorBytes:
    """The elements of one tensor in row-major order. Nothing larger than a chunk is copied."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()

    def read_into(self, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        """Fill ``nbytes`` of a buffer from ``position`` on with the bytes at ``offset``."""
        import torch

        size = self._tensor.element_size()
        done = 0
        for part in _parts(self._tensor, offset // size, (offset + nbytes) // size):
            # Conjugated and negated views are flags until somebody copies them.
            plain = part.resolve_conj().resolve_neg().contiguous().cpu().view(torch.uint8)
            target = torch.frombuffer(
                buffer.view, dtype=torch.uint8, count=len(plain), offset=position + done
            )
            target.copy_(plain)
            done += len(plain)


def _parts(tensor: torch.Tensor, begin: int, end: int) -> Iterable[torch.Tensor]:
    """Yield elements ``begin`` to ``end`` in row-major order, as flat tensors of bounded size."""
    if tensor.is_contiguous():
        step = CHUNK_BYTES // tensor.element_size()
        flat = tensor.reshape(-1)
        for start in range(begin, end, step):
            yield flat[start : min(start + step, end)]
        return
    row = tensor.numel() // len(tensor)
    if row * tensor.element_size() > _STRIDED_BYTES:
        for number in range(begin // row, -(-end // row)):
            first = number * row
            yield from _parts(tensor[number], max(begin - first, 0), min(end - first, row))
        return
    step = max(1, _STRIDED_BYTES // (row * tensor.element_size()))
    for number in range(begin // row, -(-end // row), step):
        first = number * row
        flat = tensor[number : number + step].reshape(-1)
        yield flat[max(begin - first, 0) : end - first]


def collect_tensors(
    tensors: Mapping[str, torch.Tensor], locate: Mapping[int, tuple[ByteSource, int]] | None = None
) -> Weights:
    """Describe tensors as weights to be written.

    Names of exactly the same memory, dtype and shape are tied: the first is stored, the others
    become its aliases. Tensors that overlap in any other way are stored each by itself.

    Args:
        tensors: By name. They must not change until they are written.
        locate: For the address of a storage, where in a file its first byte is; contiguous tensors
            in it are read from there.

    Raises:
        CheckpointError: Safetensors cannot store a value.
    """
    specs: list[TensorSpec] = []
    aliases: dict[str, str] = {}
    sources: dict[str, tuple[ByteSource, int]] = {}
    first_of: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        _check(name, tensor)
        code = dtype_code(tensor.dtype)
        shape = stored_shape(code, tensor.shape)
        nbytes = tensor.numel() * tensor.element_size()
        identity = (tensor.device, tensor.data_ptr(), code, tensor.shape, tensor.stride())
        flags = (tensor.is_conj(), tensor.is_neg())
        if nbytes and (*identity, *flags) in first_of and name != "format":
            aliases[name] = first_of[(*identity, *flags)]
            continue
        first_of[(*identity, *flags)] = name
        specs.append(TensorSpec(name, code, shape, nbytes))
        place = None
        if locate is not None and tensor.is_contiguous() and tensor.device.type == "cpu":
            place = locate.get(tensor.untyped_storage().data_ptr())
        if place is not None and not any(flags):
            start = int(tensor.storage_offset()) * tensor.element_size()
            sources[name] = place[0], place[1] + start
        else:
            sources[name] = TensorBytes(tensor), 0
    return Weights(specs, aliases, {}, sources, close=lambda: None)


def _check(name: object, tensor: object) -> None:
    import torch

    if not isinstance(name, str):
        raise CheckpointError(f"the name {shown(name)} is not text")
    if not is_unicode(name):
        raise CheckpointError(f"the name {name!a} is not valid Unicode")
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{shown(name)} is of type {type(tensor).__name__}, not a tensor",
            hint="save only the model's state_dict",
        )
    plain = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)
    if not plain or tensor.device.type == "meta":
        what = (
            "on the meta device" if tensor.device.type == "meta" else "sparse, quantized or nested"
        )
        raise CheckpointError(f"tensor {shown(name)} is {what}: it has no plain bytes to store")

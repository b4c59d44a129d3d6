"""Torch tensors that look into memory which a load filled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from sllmctl.core.checkpoint import Checkpoint, TensorEntry
from sllmctl.core.dtypes import torch_dtype, torch_shape
from sllmctl.core.header import collector_paused
from sllmctl.errors import CheckpointError
from sllmctl.native import Memory

if TYPE_CHECKING:
    import torch


def tensor_dtypes(entries: Collection[TensorEntry]) -> dict[str, torch.dtype]:
    """Torch's dtypes for the codes of tensors, all of which it can hold.

    Raises:
        CheckpointError: This torch lacks a dtype, or cannot pack the elements of a tensor.
    """
    dtypes = {code: torch_dtype(code) for code in {entry.dtype for entry in entries}}
    for entry in entries if "F4" in dtypes else ():
        try:
            torch_shape(entry.dtype, entry.shape)
        except CheckpointError as exc:
            raise CheckpointError(f"tensor `{entry.name}`: {exc}") from None
    return dtypes


class TensorBuilder:
    """Builds a checkpoint's tensors. Making one fails early where torch cannot hold them.

    Raises:
        CheckpointError: As ``tensor_dtypes`` raises it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._dtypes = tensor_dtypes(checkpoint.tensors.values())
        self._strides = checkpoint.strides

    def build(
        self, entries: Iterable[TensorEntry], places: Sequence[tuple[Memory, int]]
    ) -> dict[str, torch.Tensor]:
        """Make one tensor an entry, without copying.

        Each tensor has a storage of its own (one for all would make ``torch.save``, pickling and
        autograd carry the whole shard), and keeps the shard's memory alive.

        Args:
            entries: Whose bytes are in their place.
            places: For each shard: its memory, and the file offset of the memory's first byte.
        """
        import torch

        frombuffer, empty, strides = torch.frombuffer, torch.empty, self._strides
        known = {code: (dtype, dtype.itemsize) for code, dtype in self._dtypes.items()}
        tensors: dict[str, torch.Tensor] = {}
        with collector_paused():
            for name, code, shape, shard, offset, nbytes in entries:
                dtype, itemsize = known[code]
                if code == "F4":
                    shape = torch_shape(code, shape)
                if nbytes == 0:
                    tensors[name] = empty(shape, dtype=dtype)
                    continue
                memory, start = places[shard]
                at = offset - start
                if (memory.address + at) % itemsize:
                    # A file may hold tensors at any byte; kernels want them aligned.
                    raw = frombuffer(memory.buffer, dtype=torch.uint8, count=nbytes, offset=at)
                    tensor = raw.clone().view(dtype)
                else:
                    tensor = frombuffer(
                        memory.buffer, dtype=dtype, count=nbytes // itemsize, offset=at
                    )
                if name in strides:
                    tensor = tensor.as_strided(shape, strides[name])
                elif len(shape) != 1:
                    tensor = tensor.view(shape)
                tensors[name] = tensor
        return tensors

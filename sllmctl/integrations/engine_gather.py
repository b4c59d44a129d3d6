"""Copies of a model's weight loaders to an accelerator: through pinned memory, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

import torch

from sllmctl.core.devices import DeviceSpec, torch_runtime
from sllmctl.core.rings import CHUNK_BYTES, borrow_ring, open_device, release_staging
from sllmctl.native import Gather

_SLOTS = 4
_LEAST_ROW_BYTES = 256
_LEGACY_STREAM = 1
"""CUDA's name for the default stream, whose handle is 0. Source: cudaStreamLegacy."""


def moves() -> frozenset[Callable[..., torch.Tensor]]:
    """Functions that may copy a tensor to another device; torch_npu brings one of them."""
    names = ("to", "cuda", "npu")
    return frozenset(getattr(torch.Tensor, name) for name in names if hasattr(torch.Tensor, name))


class Rows(NamedTuple):
    """A slice of host memory in two dimensions: what one native copy takes."""

    address: int
    rows: int
    row_bytes: int
    stride_bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Rows | None:
        """The elements of a tensor, not empty, in row-major order; None where it takes more."""
        size = tensor.element_size()
        # Length and stride in bytes, innermost first, neighbours merged where they run on.
        merged = [(size, 1)]
        for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            last_length, last_stride = merged[-1]
            if length == 1:
                continue
            if stride * size == last_length * last_stride:
                merged[-1] = (last_length * length, last_stride)
            else:
                merged.append((length, stride * size))
        if len(merged) > 2:
            return None
        row_bytes = merged[0][0]
        rows, stride_bytes = merged[1] if len(merged) == 2 else (1, row_bytes)
        if stride_bytes < row_bytes:  # rows that share bytes, as a broadcast's do
            return None
        return cls(tensor.data_ptr(), rows, row_bytes, stride_bytes)


class DeviceCopies:
    """Takes over copies from host memory to NPUs and CUDA devices, each on torch's current stream.

    No address of a mapped file or of the store's memory ever reaches a device's runtime: pages
    that are not pinned are slow to copy from, and may hang. All calls come from one thread. Use it
    with ``with``: the end waits for the copies.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._gathers: dict[tuple[DeviceSpec, int], Gather] = {}

    @staticmethod
    def crosses(target: object, source: object) -> bool:
        """Whether a copy goes from host memory to an accelerator that we serve."""
        return (
            isinstance(target, torch.Tensor)
            and target.device.type in ("npu", "cuda")
            and isinstance(source, torch.Tensor)
            and source.device.type == "cpu"
        )

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Do what ``target.copy_(source)`` does.

        Args:
            target: On an accelerator, of any strides.
            source: On cpu, of any strides and dtype; broadcast to the target's shape. Free again
                when this returns.

        Raises:
            DeviceError: The runtime refused, or stalled.
            HostMemoryError: No memory could be pinned.
        """
        source = source.detach().expand(target.shape)
        if not target.numel():
            return
        if source.dtype != target.dtype:
            source = source.to(target.dtype)
        source = source.resolve_conj().resolve_neg()
        # In the order of the target's memory, whatever the order of its dimensions.
        order = sorted(range(target.dim()), key=target.stride, reverse=True)
        target, source = target.permute(order), source.permute(order)
        if not target.is_contiguous():
            if target[0].numel() * target.element_size() >= _LEAST_ROW_BYTES:
                for part, row in zip(target, source, strict=True):
                    self.copy(part, row)
            else:
                # Many short runs: at once to the device, and apart there.
                whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
                self.copy(whole, source)
                target.detach().copy_(whole)
            return
        rows = Rows.of(source)
        if rows is None:
            source = source.contiguous()
            rows = Rows.of(source)
            assert rows is not None
        spec = DeviceSpec(target.device.type, target.device.index or 0)
        with _current(spec):
            stream = getattr(torch_runtime(spec).current_stream(), f"{spec.kind}_stream")
            key = spec, int(stream) or _LEGACY_STREAM
            if key not in self._gathers:
                self._gathers[key] = self._stack.enter_context(_gathering(*key))
            self._gathers[key].copy(
                target.data_ptr(),
                rows.address,
                rows=rows.rows,
                row_bytes=rows.row_bytes,
                source_stride_bytes=rows.stride_bytes,
            )

    def moved(
        self,
        func: Callable[..., torch.Tensor],
        source: torch.Tensor,
        *args: object,
        memory_format: torch.memory_format | None = None,
        **kwargs: object,
    ) -> torch.Tensor | None:
        """Do what one of ``moves`` does from host memory to an accelerator; else None."""
        if source.device.type != "cpu":
            return None
        like = func(torch.empty(0, dtype=source.dtype, device="cpu"), *args, **kwargs)
        if not self.crosses(like, source):
            return None
        strides = torch.empty_like(
            source, device="meta", memory_format=memory_format or torch.preserve_format
        ).stride()
        target = torch.empty_strided(source.shape, strides, dtype=like.dtype, device=like.device)
        self.copy(target, source)
        return target

    def __enter__(self) -> DeviceCopies:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._stack:
            gathers, self._gathers = self._gathers, {}
            if kind is None:
                for (spec, _stream), gather in gathers.items():
                    with _current(spec):
                        gather.synchronize()


def _current(spec: DeviceSpec) -> AbstractContextManager[object]:
    """Make a device the thread's current one, as a gather wants it."""
    context: AbstractContextManager[object] = torch_runtime(spec).device(spec.ordinal)
    return context


@contextmanager
def _gathering(spec: DeviceSpec, stream: int) -> Iterator[Gather]:
    """A gather on a stream of the current device; its pinned memory is given back."""
    try:
        with borrow_ring(spec, chunk_bytes=CHUNK_BYTES, chunks=_SLOTS, readers=_SLOTS) as ring:
            gather = Gather(open_device(spec), ring, stream=stream)
            try:
                yield gather
            finally:
                with _current(spec):
                    gather.close()
    finally:
        release_staging([spec])

"""Memory on a device for many tensors: slabs of torch's, and tensors that look into them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from sllmctl.core.devices import DeviceSpec, check_device_memory
from sllmctl.core.units import format_size
from sllmctl.errors import DeviceError

if TYPE_CHECKING:
    import torch

SLAB_BYTES = 2**30
ALIGN_BYTES = 512
"""Where a tensor starts: a multiple of this, as in memory that torch's own allocators give."""


class Place(NamedTuple):
    """Where a tensor's bytes are: which slab, and the offset of the first."""

    slab: int
    offset: int


def plan_slabs(sizes: Sequence[int]) -> tuple[list[Place], list[int]]:
    """Place tensors one after the other in slabs of at most 1 GiB, each whole in one of them.

    A tensor that is larger is a slab of its own; one without bytes takes no room.

    Args:
        sizes: Of the tensors, in bytes.

    Returns:
        A place for each, and the sizes of the slabs in bytes.
    """
    places: list[Place] = []
    slabs: list[int] = []
    for nbytes in sizes:
        taken = -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
        if not slabs or (slabs[-1] and slabs[-1] + taken > SLAB_BYTES):
            slabs.append(0)
        places.append(Place(len(slabs) - 1, slabs[-1]))
        slabs[-1] += taken
    return places, [nbytes for nbytes in slabs if nbytes]


class Slabs:
    """Memory on one device, for tensors of given sizes.

    It is torch's, allocated on the calling thread, and ends with the last tensor of each slab.

    Args:
        spec: The device.
        sizes: Of the tensors, in bytes.
        slab_bytes: The least size of a slab. With equal ones, torch can use one again for another.

    Raises:
        DeviceError: The device has not so much memory free.
        DeviceUnavailable: The device is not there.
    """

    def __init__(self, spec: DeviceSpec, sizes: Sequence[int], *, slab_bytes: int = 0) -> None:
        import torch

        self.spec = spec
        self.places, planned = plan_slabs(sizes)
        needed = [max(nbytes, slab_bytes) for nbytes in planned]
        check_device_memory(spec, sum(needed))
        self._slabs: list[torch.Tensor] = []
        for nbytes in needed:
            try:
                slab = torch.empty(nbytes, dtype=torch.uint8, device=str(spec))
            except RuntimeError as exc:  # torch's own OutOfMemoryError, where it has one, is one
                reason = str(exc).strip().partition("\n")[0]
                raise DeviceError(
                    f"{spec} cannot allocate {format_size(nbytes)} of the "
                    f"{format_size(sum(needed))} that the load needs: {reason}",
                    hint="stop other processes on the device, or spread the load over several "
                    "with a device_map",
                ) from exc
            self._slabs.append(slab)
        self._typed: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._addresses = [slab.data_ptr() for slab in self._slabs]

    def address(self, index: int) -> int:
        """Where the bytes of a tensor that has some belong."""
        slab, offset = self.places[index]
        return self._addresses[slab] + offset

    def fetch(self, slab: int, start: int, end: int) -> memoryview:
        """Copy a part of a slab back to the host."""
        return self._slabs[slab][start:end].cpu().numpy().data

    def tensor(
        self,
        index: int,
        nbytes: int,
        dtype: torch.dtype,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """``shape``, ``dtype``: a tensor, without copying; row-major unless strides say otherwise.

        It shares its storage with the slab's others and nothing else: for autograd, a write to one
        of them is none to another.
        """
        import torch

        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=str(self.spec))
        slab, offset = self.places[index]
        if (slab, dtype) not in self._typed:
            self._typed[slab, dtype] = self._slabs[slab].view(dtype)
        whole = self._typed[slab, dtype]
        if strides is None:
            strides = row_major(shape)
        # One call, for a checkpoint may have 100,000 tensors; `.data`, for a view would share its
        # version counter with all of the slab.
        return whole.as_strided(shape, strides, offset // dtype.itemsize).data


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    if len(shape) == 1:
        return (1,)
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()

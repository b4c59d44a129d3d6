"""What a model's weight loaders write: seen write by write, so that nothing stays unwritten.

What they copy to an accelerator goes there through pinned memory on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from sllmctl.integrations.engine_gather import DeviceCopies, moves
from sllmctl.integrations.engine_state import storage_address

if TYPE_CHECKING:
    from torch import nn

_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_COPY, _SET_ITEM = torch.Tensor.copy_, torch.Tensor.__setitem__
_FILL, _ZERO = torch.Tensor.fill_, torch.Tensor.zero_
_WRITERS = frozenset({_COPY, _FILL, _ZERO, torch.Tensor.set_})
_MADE_EMPTY = frozenset({torch.empty, torch.empty_like, torch.empty_strided})
_MADE_FULL = frozenset({torch.zeros, torch.zeros_like, torch.ones, torch.ones_like, torch.full})
_TRUE = torch.tensor(True, device="cpu")
# What writes a part that is no view: the same, done to flags of the elements.
_MARKERS: Mapping[Any, Callable[..., Any]] = {
    torch.Tensor.index_copy_: lambda flags, dim, index, source: flags.index_fill_(
        dim, _on_cpu(index), True
    ),
    torch.Tensor.index_fill_: lambda flags, dim, index, value: flags.index_fill_(
        dim, _on_cpu(index), True
    ),
    torch.Tensor.index_put_: lambda flags, indices, values, accumulate=False: flags.index_put_(
        _on_cpu(indices), _TRUE
    ),
    torch.Tensor.scatter_: lambda flags, dim, index, *_, **__: flags.scatter_(
        dim, _on_cpu(index), True
    ),
    torch.Tensor.masked_fill_: lambda flags, mask, value: flags.masked_fill_(_on_cpu(mask), True),
    torch.Tensor.masked_scatter_: lambda flags, mask, source: flags.masked_fill_(
        _on_cpu(mask), True
    ),
    _SET_ITEM: lambda flags, index, value: flags.__setitem__(_on_cpu(index), True),
}


class _Region(NamedTuple):
    """Bytes of a storage: where the first is, and lengths and strides, outermost first."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Region:
        size = tensor.element_size()
        return cls(
            int(tensor.storage_offset()) * size,
            (*tensor.shape, size),
            (*(stride * size for stride in tensor.stride()), 1),
        )

    @property
    def run(self) -> tuple[int, int] | None:
        """Start and end, if the bytes are neighbours."""
        nbytes = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != nbytes:
                return None
            nbytes *= length
        return self.offset, self.offset + nbytes


class InitialValues(TorchFunctionMode):
    """Notes, until `stop`, which parameters a model's constructor fills itself.

    Their padding, and what they hold where a checkpoint says nothing, is as the model wants it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._filled: set[int | None] = set()
        self._active = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, and note the memory that it fills."""
        result = func(*args, **kwargs or {})
        if func in _MADE_FULL:
            self._filled.add(storage_address(result))
        elif func in _MADE_EMPTY:
            # Where something was that is gone.
            self._filled.discard(storage_address(result))
        elif func in (_FILL, _ZERO, _SET_ITEM):
            self._filled.add(storage_address(args[0]))
        return result

    def __enter__(self) -> InitialValues:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._active = True
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Note no more: what the checkpoint writes is another matter."""
        if self._active:
            self._active = False
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def names(self, model: nn.Module) -> set[str]:
        """Names of a model's parameters that it filled, wholly or in part."""
        filled = self._filled - {None}
        return {
            name for name, value in model.named_parameters() if storage_address(value) in filled
        }


class WeightWrites(TorchFunctionMode):
    """Notes every write to a model's parameters while it is active, in the thread that entered it.

    Engines cut and fuse weights with ``Tensor.copy_`` into views of their parameters, and say at
    most which parameters got anything at all. The bytes that were written tell what is missing.
    A copy from host memory to an accelerator is done by ``DeviceCopies``; one within host memory,
    or within a device, is torch's as ever. Leaving it waits for the copies.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._copies = DeviceCopies()
        self._moves = moves()
        # All that is looked at: loaders call many functions that write nothing.
        self._seen = _WRITERS | self._moves | {_SET_DATA, *_MARKERS}
        # Of what was written by index or mask, for each byte of a storage.
        self._flags: dict[int, torch.Tensor] = {}
        self._regions: dict[int, list[_Region]] = {
            address: []
            for parameter in model.parameters()
            if (address := storage_address(parameter)) is not None
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, and note the tensor that it writes to."""
        kwargs = kwargs or {}
        if func not in self._seen:
            return func(*args, **kwargs)
        result = self._take_over(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        if func in _WRITERS:
            self._note(args[0])
        elif func in _MARKERS:
            self._note_elements(func, *args, **kwargs)
        elif func == _SET_DATA and (address := storage_address(args[0])) is not None:
            self._regions.setdefault(address, [])
            self._note(args[0])
        return result

    def __enter__(self) -> WeightWrites:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._copies.__exit__(*exc)

    def _take_over(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Do what a function does, if it copies from host memory to an accelerator; else None."""
        if func == _COPY and len(args) > 1 and self._copies.crosses(args[0], args[1]):
            self._copies.copy(args[0], args[1])
            return args[0]
        if func == _SET_ITEM and self._copies.crosses(args[0], args[2]):
            part = args[0][args[1]]
            if storage_address(part) == storage_address(args[0]):
                self._copies.copy(part, args[2])
                return args[0]
        elif func in self._moves:
            return self._copies.moved(func, *args, **kwargs)
        return None

    def _note(self, tensor: torch.Tensor) -> None:
        regions = self._regions.get(storage_address(tensor) or 0)
        if regions is not None and tensor.numel():
            regions.append(_Region.of(tensor))

    def _note_elements(
        self, func: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Note what a function writes that takes an index or a mask."""
        address = storage_address(tensor) or 0
        if address not in self._regions:
            return
        if func == _SET_ITEM:
            part = tensor[args[0]]
            if storage_address(part) == address:
                self._note(part)
                return
        if address not in self._flags:
            nbytes = tensor.untyped_storage().nbytes()
            self._flags[address] = torch.zeros(nbytes, dtype=torch.bool, device="cpu")
        offset, (*shape, size), (*strides, _) = _Region.of(tensor)
        for byte in range(size):
            flags = torch.as_strided(self._flags[address], shape, strides, offset + byte)
            _MARKERS[func](flags, *args, **kwargs)

    def written_bytes(self, parameter: torch.Tensor) -> int | None:
        """How many bytes of a parameter were written; None where it has come to lie elsewhere."""
        address = storage_address(parameter) or 0
        regions = self._regions.get(address)
        if regions is None:
            return None
        whole = _Region.of(parameter)
        if whole in regions:
            return parameter.numel() * parameter.element_size()
        runs = [region.run for region in regions]
        flags = self._flags.get(address)
        if flags is None and whole.run is not None and None not in runs:
            return _overlap(whole.run, [run for run in runs if run is not None])
        nbytes = parameter.untyped_storage().nbytes()
        mask = torch.zeros(nbytes, dtype=torch.bool, device="cpu")
        if flags is not None:
            mask.copy_(flags)
        for region in regions:
            torch.as_strided(mask, region.shape, region.strides, region.offset).fill_(True)
        return int(torch.as_strided(mask, whole.shape, whole.strides, whole.offset).sum())


def _on_cpu(value: Any) -> Any:
    """An index, with what it has of tensors in host memory."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return type(value)(map(_on_cpu, value)) if isinstance(value, (tuple, list)) else value


def _overlap(whole: tuple[int, int], runs: Sequence[tuple[int, int]]) -> int:
    """Bytes of a range that a set of ranges covers."""
    covered, reached = 0, whole[0]
    for start, end in sorted(runs):
        start, end = max(start, reached), min(end, whole[1])
        if end > start:
            covered += end - start
            reached = end
    return covered

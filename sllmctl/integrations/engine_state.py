"""What an engine's model is made of, and what a load changes besides the tensors of its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xxhash
from torch import nn

_DEPTH = 4
"""Containers within containers that are looked into."""
_TORCHS_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and persistent buffers, tied ones under each of their names."""
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Say in what two descriptions differ, name by name."""
    return [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model before its load, in all that the load must leave alone for its state to be kept.

    A fresh model is given the tensors of a state, and nothing else that a load does: a draft that
    finds a head of its own notes it in an attribute, another model fills a tensor beside its state.

    Attributes:
        shapes: dtype, shape and kind of place of each tensor of the state.
        beside: What modules have besides, attributes, and buffers that are not of the state: of
            tensors a digest, of plain containers what they hold.
    """

    shapes: Mapping[str, tuple[Any, ...]]
    beside: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Take one. Tensors beside the state are read once, through host memory."""
        digests = _Digests(model)
        return cls(_shapes(model), {name: digests.held(value) for name, value in _beside(model)})

    def changes(self, model: nn.Module) -> list[str]:
        """Say what a load has changed that a fresh model would lack."""
        now = Snapshot.of(model)
        names = [name for name in self.beside if name not in now.beside]
        names += [
            name
            for name, value in now.beside.items()
            # What holds nothing says nothing that a fresh model would miss.
            if not (_same(self.beside[name], value) if name in self.beside else _empty(value))
        ]
        return [
            *differences(self.shapes, now.shapes),
            *(f"the load sets `{name}`" for name in sorted(names)),
        ]


def _shapes(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.device.type)
        for name, tensor in state_of(model).items()
    }


def _beside(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of all modules, by name, and of parameters: engines' loaders keep notes there."""
    for prefix, module in model.named_modules():
        outside = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in {**vars(module), **outside}.items():
            if name not in _TORCHS_OWN:
                yield f"{prefix}.{name}".lstrip("."), value
    for prefix, parameter in model.named_parameters():
        for name, value in vars(parameter).items():
            yield f"{prefix}.{name}", value


class _Digests:
    """Values as they are now, each memory of tensors read once: many modules may share one.

    That of the state's tensors is not: it is what a load fills.
    """

    def __init__(self, model: nn.Module) -> None:
        self._state = {storage_address(tensor) for tensor in state_of(model).values()} - {None}
        self._of_memory: dict[tuple[int | None, int], str] = {}

    def held(self, value: Any, depth: int = _DEPTH) -> Any:
        """Of a tensor its bytes' digest, of a container the same of what it holds."""
        if isinstance(value, torch.Tensor):
            return self._of_tensor(value)
        if isinstance(value, (set, frozenset)):
            return _Held(type(value), (frozenset(value),) if value else ())
        if depth and isinstance(value, Mapping):
            value = [part for item in value.items() for part in item]
            return _Held(dict, tuple(self.held(part, depth - 1) for part in value))
        if depth and isinstance(value, (list, tuple)):
            return _Held(type(value), tuple(self.held(part, depth - 1) for part in value))
        return value

    def _of_tensor(self, value: torch.Tensor) -> _Bytes:
        layout = value.dtype, value.shape, value.stride(), value.storage_offset(), value.device
        if value.is_meta or storage_address(value) in self._state:
            return _Bytes((*layout, ""))
        storage = value.untyped_storage()
        key = storage_address(value), storage.nbytes()
        if key not in self._of_memory:
            whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            self._of_memory[key] = xxhash.xxh3_128_hexdigest(whole.cpu().numpy().data)
        return _Bytes((*layout, self._of_memory[key]))


class _Bytes(tuple[Any, ...]):
    """What a tensor is and holds: equal for two that are the same."""

    __slots__ = ()


class _Held(NamedTuple):
    """A container's type, and what it holds, of a mapping keys and values in turn."""

    kind: type
    items: tuple[Any, ...]


_EQUAL = (bool, int, float, complex, str, bytes, frozenset, torch.dtype, torch.device, _Bytes)
"""What is the same if it is equal; of anything else the very object has to be there."""


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, _Held) and not value.items)


def _same(before: Any, now: Any) -> bool:
    """Whether a value is what it was; an object is the same if it is the very one."""
    if isinstance(before, _Held) and isinstance(now, _Held):
        return (
            before.kind is now.kind
            and len(before.items) == len(now.items)
            and all(map(_same, before.items, now.items))
        )
    return before is now or (
        type(before) is type(now) and isinstance(now, _EQUAL) and bool(before == now)
    )


def storage_address(tensor: torch.Tensor) -> int | None:
    """Where a tensor's storage starts; None for those that have none, such as meta tensors."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None

"""Which tensor goes to which device: what a ``device_map`` means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from sllmctl.core.checkpoint import Checkpoint, natural_key
from sllmctl.core.devices import DeviceSpec, accelerators, find_device, free_memory_bytes
from sllmctl.core.units import format_size
from sllmctl.errors import ConfigError, DeviceError

Placement = Mapping[str, DeviceSpec]
"""The device of every name, those of tied tensors included."""

_SPREADS = ("auto", "balanced", "sequential")
_BLOCK = re.compile(r"(.*?\.[0-9]+)(?:\.|$)")
_ROOM = 0.9
"""How much of a device's free memory a choice of ours fills: what follows a load needs some."""


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """What a caller said about devices, all of which are there.

    Attributes:
        modules: A device for what is below each module; ``""`` is all the rest.
        spread: Accelerators to choose from instead, by their room.
        balanced: Whether to give each of them the same, rather than to fill one after the other.
        exact: Whether a module that a checkpoint lacks is an error.
    """

    modules: Mapping[str, DeviceSpec]
    spread: Sequence[DeviceSpec] = ()
    balanced: bool = False
    exact: bool = False

    @classmethod
    def parse(cls, device_map: object) -> DeviceMap:
        """Read a device map, and load what torch needs for its devices.

        Args:
            device_map: A device for all, as ``devices.find_device`` takes it. Or a dict of modules'
                names, matched on dots, the longest that fits first, with ``""`` for the rest. Or
                ``"balanced"`` (the same for each accelerator), ``"sequential"`` (each is filled
                before the next) or ``"auto"`` (balanced, where that fits).

        Raises:
            ConfigError: The map makes no sense.
            DeviceUnavailable: A device in it is not there.
        """
        if isinstance(device_map, DeviceMap):
            return device_map
        if isinstance(device_map, Mapping):
            modules = {_module(key, place): find_device(place) for key, place in device_map.items()}
            kinds = {spec.kind for spec in modules.values()} - {"cpu"}
            if len(kinds) > 1:
                raise ConfigError(
                    f"device_map names devices of two kinds: {' and '.join(sorted(kinds))}",
                    hint="load to one kind of accelerator at a time, and to cpu besides",
                )
            return cls(modules, exact=True)
        if device_map not in _SPREADS:
            return cls({"": find_device(device_map)})
        devices = accelerators() or [DeviceSpec("cpu")]
        if len(devices) == 1:
            return cls({"": devices[0]})
        return cls({}, devices, device_map != "sequential")

    def place(self, checkpoint: Checkpoint) -> Placement:
        """Choose a device for every name of a checkpoint.

        Raises:
            ConfigError: The map says nothing about a tensor, or names what the checkpoint lacks.
            DeviceError: The accelerators together have no room.
        """
        names = [*checkpoint.tensors, *checkpoint.aliases]
        if self.spread:
            return _place_by_room(checkpoint, self.spread, balanced=self.balanced)
        if list(self.modules) == [""]:
            return dict.fromkeys(names, self.modules[""])
        placement = {name: self._find(name) for name in names}
        if self.exact:
            self._require_tensors(checkpoint)
        return placement

    def _require_tensors(self, checkpoint: Checkpoint) -> None:
        there = {""}
        for name in [*checkpoint.tensors, *checkpoint.aliases]:
            while name not in there:
                there.add(name)
                name = name.rpartition(".")[0]
        for module in self.modules:
            if module not in there:
                raise ConfigError(
                    f"device_map names `{module}`, and `{checkpoint.path}` has no tensor there",
                    hint="leave it out, or write it as in the names of the checkpoint's tensors",
                )

    def _find(self, name: str) -> DeviceSpec:
        module = name
        while module and module not in self.modules:
            module = module.rpartition(".")[0]
        if module not in self.modules:
            raise ConfigError(
                f"device_map says nothing about `{name}`",
                hint='add "" to it, for everything that no other entry names',
            )
        return self.modules[module]


def _module(name: object, device: object) -> str:
    if not isinstance(name, str) or str(device) in ("disk", "meta", *_SPREADS):
        raise ConfigError(
            f"device_map puts `{name}` on `{device}`",
            hint="map names of modules to devices such as npu:0 or cpu",
        )
    return name


def _place_by_room(
    checkpoint: Checkpoint, devices: Sequence[DeviceSpec], *, balanced: bool
) -> Placement:
    blocks: dict[str, int] = {}
    for name in sorted(checkpoint.tensors, key=natural_key):
        block = block_of(name)
        blocks[block] = blocks.get(block, 0) + checkpoint.tensors[name].nbytes
    free = [free_memory_bytes(device) for device in devices]
    room = [int(_ROOM * nbytes) for nbytes in free]
    sizes = list(blocks.values())
    chosen = (balance(sizes, room) if balanced else None) or fill(sizes, room)
    if chosen is None:
        there = ", ".join(
            f"{format_size(nbytes)} on {device}"
            for device, nbytes in zip(devices, free, strict=True)
        )
        raise DeviceError(
            f"the load needs {format_size(checkpoint.nbytes)}, and free are {there}, "
            "of which a tenth is kept free",
            hint="stop other processes on the devices, or put modules on the cpu with a device_map",
        )
    of_block = dict(zip(blocks, (devices[number] for number in chosen), strict=True))
    placement = {name: of_block[block_of(name)] for name in checkpoint.tensors}
    return placement | {alias: placement[kept] for alias, kept in checkpoint.aliases.items()}


def block_of(name: str) -> str:
    """What stays together: a numbered layer (``model.layers.7``), or else a tensor's module."""
    match = _BLOCK.match(name)
    return match[1] if match else name.rpartition(".")[0] or name


def fill(blocks: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """Put blocks of so many bytes on devices in order, each as full as it gets.

    Returns:
        A device's number for each block, or None where they do not fit.
    """
    chosen: list[int] = []
    device, used = 0, 0
    for nbytes in blocks:
        while device < len(room) and used + nbytes > room[device]:
            device, used = device + 1, 0
        if device == len(room):
            return None
        chosen.append(device)
        used += nbytes
    return chosen


def balance(blocks: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """Put blocks of so many bytes on devices in order, about the same on each.

    Returns:
        A device's number for each block, or None where they do not fit.
    """
    chosen: list[int] = []
    left = sum(blocks)
    device, used = 0, 0
    share = ceil(left / len(room))
    for nbytes in blocks:
        # Past the middle of a block the share is better met without it.
        if device < len(room) - 1 and used and used + nbytes / 2 > share:
            left -= used
            device, used = device + 1, 0
            share = ceil(left / (len(room) - device))
        used += nbytes
        if used > room[device]:
            return None
        chosen.append(device)
    return chosen

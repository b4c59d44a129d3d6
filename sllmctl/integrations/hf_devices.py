"""Where the parts of a transformers model go: device maps in its own terms.

A map names modules of the model, and a checkpoint may know them by other names; a load wants a
device for each name of the checkpoint. What is placed amiss, transformers moves afterwards.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllmctl.core.checkpoint import Checkpoint
from sllmctl.core.devices import DeviceSpec, accelerators, find_device, free_memory_bytes
from sllmctl.core.placement import DeviceMap, Placement
from sllmctl.core.units import format_size
from sllmctl.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    import torch

PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
_ROOM = 0.9
"""How much of a device's free memory weights may fill: what follows a load needs some."""

_KEPT_PACKED = ("awq", "bitsandbytes", "compressed-tensors", "gptq")
"""Quantizations whose weights stay as they are stored, on every device.

Those in eight bits with blocks, and MXFP4, become bfloat16 on an NPU. Source: transformers 5.24.
"""

_warmup_lock = threading.Lock()


def sole_device(device_map: Any) -> DeviceSpec | None:
    """The device that a map means whatever the model is; None where it may mean several.

    Raises:
        ConfigError: It is no device map.
        DeviceUnavailable: The device is not there.
    """
    if device_map is None:
        return DeviceSpec("cpu")
    if isinstance(device_map, Mapping):
        if not device_map:
            raise ConfigError("device_map is empty", hint='use "auto", "cpu" or {"": "npu:0"}')
        found = {_find(device) for device in device_map.values()}
        return found.pop() if len(found) == 1 else None
    if isinstance(device_map, str) and device_map in PLACEMENTS:
        there = accelerators() or [DeviceSpec("cpu")]
        return there[0] if len(there) == 1 else None
    return find_device(device_map)


def _find(device: Any) -> DeviceSpec:
    if str(device) in ("disk", "meta", *PLACEMENTS):
        raise ConfigError(
            f"device_map puts a module on `{device}`", hint="use devices such as npu:0 or cpu"
        )
    return find_device(device)


@dataclass(frozen=True, slots=True)
class ModelPlaces(DeviceMap):
    """A device for each module of a model, and what the model calls a tensor of a checkpoint."""

    rename: Callable[[str], str] = str

    def place(self, checkpoint: Checkpoint) -> Placement:
        """Choose a device for every name of a checkpoint."""
        elsewhere = next(iter(self.modules.values()))
        placement = {}
        for name in [*checkpoint.tensors, *checkpoint.aliases]:
            module = self.rename(name)
            while module and module not in self.modules:
                module = module.rpartition(".")[0]
            placement[name] = self.modules.get(module, elsewhere)
        return placement

    def for_transformers(self) -> dict[str, str]:
        """The map as `from_pretrained` takes it."""
        return {module: str(device) for module, device in self.modules.items()}


def place_model(
    model_class: type[Any],
    config: Any,
    device_map: Any,
    dtype: torch.dtype | str,
    checkpoint: Checkpoint | None = None,
) -> ModelPlaces:
    """Choose a device for each module, as `from_pretrained` would of such a map.

    Args:
        model_class: A concrete class; one without weights is made of it.
        config: Its configuration.
        device_map: A dict, or one of `PLACEMENTS`.
        dtype: Of the weights; ``"auto"`` for that of the configuration.
        checkpoint: What says how large quantized weights are.

    Raises:
        ConfigError: The map leaves something out.
        DeviceError: The accelerators together have no room.
    """
    import torch

    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    rename = _renaming(model)
    if checkpoint is not None and _stays_packed(config):
        _count_quantized_as_stored(model, checkpoint, rename)
    modules = (
        {name: _find(device) for name, device in device_map.items()}
        if isinstance(device_map, Mapping)
        else _spread(model, device_map, dtype)
    )
    for name, _ in model.named_parameters():
        if not any(name == m or not m or name.startswith(m + ".") for m in modules):
            raise ConfigError(
                f"device_map says nothing about `{name}`",
                hint='add "" to it, for everything that no other entry names',
            )
    return ModelPlaces(_whole_modules(model, modules), rename=rename)


def _whole_modules(
    model: torch.nn.Module, modules: Mapping[str, DeviceSpec]
) -> dict[str, DeviceSpec]:
    """The same map by the largest modules that are on one device each, none inside another.

    accelerate puts all that is below a module of the map where that is, whatever else the map says.
    """

    def find(name: str) -> DeviceSpec | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return modules.get(name)

    def walk(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, DeviceSpec]]:
        tensors = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        places = {
            name: place
            for name in (f"{prefix}.{tensor}".lstrip(".") for tensor, _ in tensors)
            if (place := find(name)) is not None  # a map may leave buffers out
        }
        if len(set(places.values())) == 1:
            yield prefix, next(iter(places.values()))
            return
        yield from (item for item in places.items() if item[0].rpartition(".")[0] == prefix)
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}.{name}".lstrip("."))

    return dict(walk(model, ""))


def _stays_packed(config: Any) -> bool:
    settings = getattr(config, "quantization_config", None) or {}
    if not isinstance(settings, Mapping):
        settings = settings.to_dict()
    unpacks = settings.get("dequantize") or settings.get("run_compressed") is False
    return settings.get("quant_method") in _KEPT_PACKED and not unpacks


def _count_quantized_as_stored(
    model: Any, checkpoint: Checkpoint, rename: Callable[[str], str]
) -> None:
    """Have modules whose weights are quantized count as many bytes as the checkpoint has of them.

    The model on the meta device knows nothing of its quantizer, and of the shapes it packs into.
    """
    import torch

    stored: Counter[str] = Counter()
    quantized = set()
    for name, entry in checkpoint.tensors.items():
        # `weight.absmax` lies beside `weight`, and `qweight` and `weight_packed` in its place.
        stem = name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
        module = rename(f"{stem}.weight").rpartition(".")[0]
        stored[module] += entry.nbytes
        if entry.dtype not in ("F64", "F32", "F16", "BF16"):
            quantized.add(module)
    for prefix, child in model.named_modules():
        if prefix in quantized:
            nbytes = stored[prefix]
            for name, parameter in child.named_parameters(recurse=False):
                part = torch.empty(nbytes, dtype=torch.uint8, device=parameter.device)
                setattr(child, name, torch.nn.Parameter(part, requires_grad=False))
                nbytes = 0  # the first counts for all
    model.tie_weights()


def _spread(model: Any, how: str, dtype: torch.dtype | str) -> dict[str, DeviceSpec]:
    """Let accelerate spread a model over the accelerators."""
    import torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    devices = accelerators()
    free = {device.ordinal: free_memory_bytes(device) for device in devices}
    room: Any = {ordinal: int(_ROOM * nbytes) for ordinal, nbytes in free.items()}
    if not isinstance(dtype, torch.dtype):
        dtype = getattr(model.config, "dtype", None) or torch.float32
    whole = list(model._no_split_modules or ())
    if how != "sequential":
        room = get_balanced_memory(
            model,
            room,
            no_split_module_classes=whole,
            dtype=dtype,
            low_zero=how == "balanced_low_0",
        )
    chosen = infer_auto_device_map(model, room, no_split_module_classes=whole, dtype=dtype)
    if not all(isinstance(place, int) for place in chosen.values()):
        there = ", ".join(f"{format_size(free[d.ordinal])} on {d}" for d in devices)
        raise DeviceError(
            f"a {type(model).__name__} does not fit into what is free: {there}, "
            "of which a tenth is kept free",
            hint="stop other processes on the devices, or put modules on the cpu with a device_map",
        )
    return {module: DeviceSpec(devices[0].kind, place) for module, place in chosen.items()}


def _renaming(model: Any) -> Callable[[str], str]:
    """What a model calls a tensor that a checkpoint may call otherwise."""
    names = model.state_dict()
    prefix = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return lambda name: _rename_4(name, patterns.items(), names, prefix)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return lambda name: rename_source_key(name, renamings, converters, prefix, names)[0]


def _rename_4(
    name: str, patterns: Iterable[tuple[str, str]], names: Mapping[str, Any], prefix: str
) -> str:
    for pattern, replacement in patterns:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in names:
            return candidate
    return name


@contextmanager
def no_second_allocation() -> Iterator[None]:
    """Keep transformers from setting aside memory on devices, where the weights are already.

    It asks for as much as the weights take and gives it back, which would double the peak.
    """
    from transformers import modeling_utils

    name = "caching_allocator_warmup"
    with _warmup_lock:
        given = getattr(modeling_utils, name, None)
        if given is None:
            yield
            return
        setattr(modeling_utils, name, lambda *_, **__: None)
        try:
            yield
        finally:
            setattr(modeling_utils, name, given)

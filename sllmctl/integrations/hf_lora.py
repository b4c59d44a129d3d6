"""LoRA adapters: save one as a checkpoint of its own, load one into a model.

PEFT makes the layers and knows whose tensors are whose; only the bytes come our way. Its adapters'
parameters start on the meta device, so that nothing is made up that a file has to replace.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllmctl.api import StoreUse, load_tensors
from sllmctl.core.config import resolve_model
from sllmctl.core.devices import find_device
from sllmctl.core.header import shown
from sllmctl.core.manifest import Origin
from sllmctl.core.placement import DeviceMap
from sllmctl.core.write.convert import convert
from sllmctl.core.write.target import require_replaceable
from sllmctl.errors import CheckpointError, CheckpointNotFound, ConfigError
from sllmctl.integrations.hf_build import listed, parse_dtype
from sllmctl.integrations.hf_devices import PLACEMENTS
from sllmctl.integrations.hf_save import ADAPTER_CONFIG, keep_others

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
"""Of the names in an adapter's file, before those of the model's modules."""

_MISMATCH = re.compile(
    r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\]).*?torch\.Size\((\[.*?\])"
)


def save_lora(
    model: Any, lora_path: str | os.PathLike[str], adapter_name: str | None = None
) -> Path:
    """Save an adapter as PEFT does, with digests: PEFT, vLLM and SGLang read the directory.

    The model stays where it is. An adapter that is there already is replaced in one step; the
    tokenizer and other files beside it stay.

    Args:
        model: A ``PeftModel``, on any device.
        lora_path: Directory to write, as a path.
        adapter_name: Which of the model's adapters; the active one by default.

    Returns:
        The directory.

    Raises:
        ConfigError: That is no ``PeftModel``, it has no such adapter, several are active, peft is
            not installed, or the directory holds something else, such as a model.
        CheckpointError: The directory cannot be written.
    """
    peft = _import_peft()
    if not isinstance(model, peft.PeftModel):
        raise ConfigError(
            f"a {type(model).__name__} has no adapter of its own to save",
            hint="give the PeftModel that peft.get_peft_model or load_lora returned",
        )
    name = adapter_name
    if name is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise ConfigError(
                f"{len(active)} adapters are active", hint="say which with adapter_name"
            )
        name = active[0]
    if name not in model.peft_config:
        raise ConfigError(
            f"the model has no adapter `{name}`",
            hint=f"it has {', '.join(f'`{known}`' for known in model.peft_config)}",
        )
    target = Path(lora_path).expanduser()
    require_replaceable(target, force=True)
    if (target / "config.json").exists() or (
        any(target.glob("*.safetensors")) and not (target / ADAPTER_CONFIG).exists()
    ):
        raise ConfigError(
            f"`{target}` holds a model, and no adapter: it is not replaced",
            hint="choose another place for the adapter",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.save-") as staging:
        model.save_pretrained(staging, selected_adapters=[name])
        # Where PEFT puts an adapter depends on its name.
        written = Path(staging) / name
        source = written if (written / ADAPTER_CONFIG).is_file() else Path(staging)
        keep_others(target, source)
        convert(source, target, force=True, verify=False, origin=Origin())
    return target


def load_lora(
    model: Any,
    adapter_name: str,
    adapter_path: str | os.PathLike[str],
    device_map: Any = "auto",
    is_trainable: bool = False,
    storage_path: str | os.PathLike[str] | None = None,
    torch_dtype: torch.dtype | str | None = None,
    *,
    store: StoreUse = "auto",
) -> Any:
    """Load an adapter into a model, bit for bit as PEFT would.

    Args:
        model: A ``PreTrainedModel``, which becomes a ``PeftModel``, or a ``PeftModel``, which gets
            another adapter; ``set_adapter`` then chooses one.
        adapter_name: What the model calls the adapter from now on.
        adapter_path: A path, or a name below the storage path. Its files are those that `save_lora`
            or PEFT writes (safetensors), or sllm-store.
        device_map: ``"auto"``: the weights go to where the layers are that they adapt. Any other
            device must be that of the whole model.
        is_trainable: Whether its weights get gradients.
        storage_path: Where names are looked up; see ``core.config.storage_path``.
        torch_dtype: What its weights are cast to. Without one, what is in float16 or bfloat16
            becomes float32, as PEFT has it.
        store: ``auto`` uses a store that answers, ``require`` no other way, ``off`` none.

    Returns:
        The ``PeftModel``; its base is the given model, changed in place.

    Raises:
        CheckpointNotFound: No adapter is there, or it has no ``adapter_config.json``.
        CheckpointError: A weight is missing, unexpected or of another shape; the model is then as
            it was.
        ConfigError: It is no LoRA adapter or does not suit the model, the name is taken, or peft is
            not installed.
        StoreUnreachable: A store is required, and none answers.
    """
    from transformers import PreTrainedModel

    peft = _import_peft()
    wrapped = isinstance(model, peft.PeftModel)
    if not wrapped and not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"a {type(model).__name__} cannot take an adapter",
            hint="give a transformers model, or the PeftModel that it became",
        )
    if wrapped and adapter_name in model.peft_config:
        raise ConfigError(
            f"the model has an adapter `{adapter_name}` already",
            hint="choose another name, or remove that one with model.delete_adapter",
        )
    if not adapter_name or "." in adapter_name:
        raise ConfigError(
            f"an adapter cannot be called `{adapter_name}`", hint="use a name without dots"
        )
    dtype = parse_dtype(torch_dtype)
    place = _place(model, device_map)
    path = resolve_model(adapter_path, storage_path)
    config = _read_config(peft, path)
    config.inference_mode = not is_trainable
    tensors = load_tensors(adapter_path, device_map=place, storage_path=storage_path, store=store)
    return _attach(peft, model, adapter_name, config, tensors, path, dtype)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as exc:
        raise ConfigError(f"adapters need peft: {exc}", hint="pip install 'sllmctl[lora]'") from exc
    return peft


def _read_config(peft: Any, path: Path) -> Any:
    if not (path / ADAPTER_CONFIG).is_file():
        raise CheckpointNotFound(
            f"`{path}` has no {ADAPTER_CONFIG}, so it is no adapter",
            hint="an adapter is a directory that save_lora or PEFT's save_pretrained wrote",
        )
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
    except Exception as exc:  # whatever a foreign configuration does to the class that reads it
        reason = str(exc).strip().partition("\n")[0]
        raise ConfigError(
            f"peft {peft.__version__} cannot read `{path / ADAPTER_CONFIG}`: {reason}",
            hint="a newer peft may know it",
        ) from exc
    if config.peft_type != peft.PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(
            f"`{path}` is an adapter of type {kind}, not LoRA",
            hint="load it with peft.PeftModel.from_pretrained",
        )
    return config


def _place(model: Any, device_map: Any) -> object:
    """Where an adapter's weights go: to the layers that they adapt.

    Raises:
        ConfigError: The device map says something else, or the model has weights elsewhere.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    of_module = {
        name.rpartition(".")[0]: str(parameter.device)
        for name, parameter in base.named_parameters()
    }
    devices = list(dict.fromkeys(of_module.values()))
    if "meta" in devices or ("cpu" in devices and len(devices) > 1):
        raise ConfigError(
            "parts of the model are offloaded, which an adapter cannot follow",
            hint="load the model to its devices whole, or the adapter with peft.PeftModel",
        )
    asked = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for device in asked:
        if device not in (None, *PLACEMENTS) and [str(find_device(device))] != devices:
            raise ConfigError(
                f"device_map puts the adapter on `{device}`, but the model is on "
                + ", ".join(devices),
                hint='use device_map="auto": the weights go to the layers that they adapt',
            )
    if len(devices) == 1:
        return devices[0]
    places = {"": devices[0]} | {_PREFIX + name: device for name, device in of_module.items()}
    return DeviceMap({name: find_device(device) for name, device in places.items()})


def _attach(
    peft: Any,
    model: Any,
    adapter_name: str,
    config: Any,
    tensors: dict[str, torch.Tensor],
    path: Path,
    dtype: torch.dtype | str,
) -> Any:
    """Make the adapter's layers, and fill them.

    Raises:
        CheckpointError: The weights do not fit.
        ConfigError: PEFT cannot make such layers in this model.
    """
    wrapped = isinstance(model, peft.PeftModel)
    restore = _remember(model)

    def undo() -> None:
        if wrapped:
            model.peft_config.setdefault(adapter_name, config)  # PEFT forgets what failed half way
            model.delete_adapter(adapter_name)
        restore()

    try:
        if wrapped:
            model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
            adapted = model
        else:
            # PEFT would write this model's name over that of the adapter's, and warn of it.
            trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None
            adapted = peft.get_peft_model(
                model, config, adapter_name=adapter_name, low_cpu_mem_usage=True
            )
            config.base_model_name_or_path = trained_on
    except (ValueError, TypeError, LookupError, AttributeError, ImportError) as exc:
        undo()
        reason = str(exc).strip().partition("\n")[0]
        raise ConfigError(
            f"the adapter `{path}` does not suit a {_class_name(model)}: {reason}",
            hint="it was made for another model",
        ) from exc
    except BaseException:  # no memory, or Ctrl-C
        undo()
        raise
    try:
        _fill(peft, adapted, adapter_name, tensors, path, dtype)
    except BaseException:
        undo()
        raise
    if config.inference_mode:
        adapted.eval()
    return adapted


def _remember(model: torch.nn.Module) -> Callable[[], None]:
    """What makes a model again what it is now, of the same modules and parameters."""
    modules = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
    ]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))

    def restore() -> None:
        for parent, name, child in modules:
            setattr(parent, name, child)
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)
        for name in vars(model).keys() - attributes:
            delattr(model, name)

    return restore


def _fill(
    peft: Any,
    model: Any,
    adapter_name: str,
    tensors: dict[str, torch.Tensor],
    path: Path,
    dtype: torch.dtype | str,
) -> None:
    """Give an adapter on the meta device its weights.

    Raises:
        CheckpointError: One is missing, unexpected or of another shape.
    """

    def put(*, assign: bool) -> Any:
        return peft.set_peft_model_state_dict(
            model, dict(tensors), adapter_name=adapter_name, low_cpu_mem_usage=assign
        )

    # What PEFT copies from the model, and does not make anew, keeps the model's dtype.
    kept = {name: p.dtype for name, p in _own(model, adapter_name) if not p.is_meta}
    try:
        result = put(assign=True)
    except KeyError as exc:
        raise _misfit(path, model, [f"missing: {shown(exc.args[0])}"]) from exc
    except (RuntimeError, LookupError) as exc:
        found = _MISMATCH.findall(str(exc).replace("\n", " "))
        wrong = [f"{shown(name)} is {file} instead of {wanted}" for name, file, wanted in found]
        problem = f"of another shape: {listed(wrong)}" if wrong else str(exc).strip()
        raise _misfit(path, model, [problem.partition("\n")[0]]) from exc
    own = _own(model, adapter_name)
    problems = [
        f"{word}: {listed(sorted(map(shown, names)))}"
        for word, names in (
            ("missing", [name for name, parameter in own if parameter.is_meta]),
            ("unexpected", result.unexpected_keys),
        )
        if names
    ]
    if problems:
        raise _misfit(path, model, problems)
    # Assigned weights were moved to their layers, and cast as these are: one more pass, into the
    # dtype that they are to have, brings back what that cost.
    if isinstance(dtype, str):
        model.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=True)
    for name, parameter in _own(model, adapter_name):
        wanted = kept.get(name, parameter.dtype) if isinstance(dtype, str) else dtype
        parameter.data = parameter.data.to(wanted)
    put(assign=False)


def _own(model: Any, adapter_name: str) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if adapter_name in n.split(".")]


def _misfit(path: Path, model: Any, problems: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"the weights in `{path}` do not fit a {_class_name(model)}: {'; '.join(problems)}",
        hint="the adapter was made for another model, or its files are damaged",
    )


def _class_name(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__

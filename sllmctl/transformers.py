"""Models for transformers: load one from a checkpoint, save one as a checkpoint.

```python
from sllmctl.transformers import load_model, save_model

model = load_model("Qwen/Qwen3-8B", torch_dtype="bfloat16", storage_path="./models")
save_model(model, "./models/mine")
```
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sllmctl.api import StoreUse, start_load
from sllmctl.core.background import Loading
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.config import resolve_model
from sllmctl.core.devices import DeviceSpec
from sllmctl.errors import CheckpointNotFound, ConfigError
from sllmctl.integrations.hf_build import Skeleton, build_model, make_skeleton, parse_dtype
from sllmctl.integrations.hf_devices import ModelPlaces, place_model, sole_device
from sllmctl.integrations.hf_lora import load_lora, save_lora
from sllmctl.integrations.hf_save import save_model

if TYPE_CHECKING:
    import torch

_NOT_PASSED_ON = ("config", "state_dict", "output_loading_info", "ignore_mismatched_sizes")
"""What ``from_pretrained`` takes and we give it ourselves."""

__all__ = ["load_lora", "load_model", "save_lora", "save_model"]


def load_model(
    model_path: str | os.PathLike[str],
    device_map: Any = "auto",
    torch_dtype: torch.dtype | str | None = None,
    quantization_config: Any = None,
    storage_path: str | os.PathLike[str] | None = None,
    fully_parallel: bool = False,
    hf_model_class: str | type[Any] = "AutoModelForCausalLM",
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    store: StoreUse = "auto",
    **model_kwargs: Any,
) -> Any:
    """Load a model, bit for bit the one that ``from_pretrained`` of its directory makes.

    The weights are not copied on their way: a parameter is the loaded tensor, unless it has to be
    cast, fused or quantized.

    Args:
        model_path: A path, or a name below the storage path.
        device_map: A device (``"npu:0"``, ``"cuda:1"``, ``"cpu"``, a number), a dict of devices by
            module, or what spreads the model over all accelerators: ``"auto"``, ``"balanced"``,
            ``"balanced_low_0"``, ``"sequential"``; that is the cpu where there is none.
        torch_dtype: A floating dtype or its name; ``None`` and ``"auto"`` are the checkpoint's own.
        quantization_config: transformers' settings for quantizing while loading.
        storage_path: Where names are looked up; see ``core.config.storage_path``.
        fully_parallel: Import and prepare the model's class while the bytes move, unless the model
            is to be spread over several devices, for which it has to be known first.
        hf_model_class: An Auto class or a concrete one, or the name of either in ``transformers``.
        trust_remote_code: Run the modelling code that comes with the checkpoint.
        attn_implementation: transformers' name of an attention kernel.
        store: ``auto`` uses a store that answers, ``require`` no other way, ``off`` none.
        model_kwargs: Settings that override the checkpoint's configuration. ``dtype`` is another
            name of ``torch_dtype``.

    Returns:
        The ``PreTrainedModel``, in evaluation mode.

    Raises:
        CheckpointNotFound: No checkpoint is there, or it has no ``config.json``.
        CheckpointError: It is damaged, or a weight is missing, unexpected or of another shape.
        ConfigError: transformers cannot make such a model, or an argument makes no sense.
        DeviceUnavailable: A device is not there, or torch has no backend for it.
        DeviceError: A device has no room, or it failed.
        StoreUnreachable: A store is required, and none answers.
    """
    for name in (*_NOT_PASSED_ON, "max_memory"):
        if name in model_kwargs:
            raise ConfigError(
                f"load_model takes no `{name}`",
                hint="settings of the model's configuration are keyword arguments by their names; "
                "what goes where is a dict device_map's to say",
            )
    model_kwargs.pop("local_files_only", None)  # nothing is downloaded anyway
    dtype = parse_dtype(model_kwargs.pop("dtype", torch_dtype))
    places: DeviceSpec | ModelPlaces | None = sole_device(device_map)
    path = resolve_model(model_path, storage_path)

    def prepare() -> Skeleton:
        return make_skeleton(
            path, hf_model_class, trust_remote_code=trust_remote_code, **model_kwargs
        )

    def load(places: DeviceSpec | ModelPlaces) -> Loading:
        return start_load(model_path, device_map=places, storage_path=storage_path, store=store)

    if fully_parallel and places is not None:
        with load(places) as loading:
            skeleton = prepare()
            tensors = loading.wait().tensors
    else:
        skeleton = prepare()
        if places is None:
            stored = None
            with suppress(CheckpointNotFound):  # the store alone may have it
                # Of other settings than the checkpoint's own nobody knows what they make of it.
                stored = open_checkpoint(path) if quantization_config is None else None
            places = place_model(skeleton.model_class, skeleton.config, device_map, dtype, stored)
        with load(places) as loading:
            tensors = loading.wait().tensors
    if isinstance(places, ModelPlaces):
        modules: dict[str, str] | None = places.for_transformers()
    else:
        modules = None if places.kind == "cpu" else {"": str(places)}
    return build_model(
        skeleton,
        tensors,
        torch_dtype=dtype,
        quantization_config=quantization_config,
        attn_implementation=attn_implementation,
        device_map=modules,
    )

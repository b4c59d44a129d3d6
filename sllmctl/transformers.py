"""Models for transformers: load one from a checkpoint, save one as a checkpoint.

```python
from sllmctl.transformers import load_model, save_model

model = load_model("Qwen/Qwen3-8B", torch_dtype="bfloat16", storage_path="./models")
save_model(model, "./models/mine")
```
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from sllmctl.api import StoreUse, load_tensors
from sllmctl.core.config import resolve_model
from sllmctl.core.devices import require_cpu
from sllmctl.errors import ConfigError
from sllmctl.integrations.hf_build import build_model, make_skeleton, parse_dtype
from sllmctl.integrations.hf_lora import load_lora, save_lora
from sllmctl.integrations.hf_save import save_model

if TYPE_CHECKING:
    import torch

__all__ = ["load_lora", "load_model", "save_lora", "save_model"]

T = TypeVar("T")
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


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
        device_map: ``"cpu"``, a dict that says so, or a placement such as ``"auto"`` on a machine
            without an accelerator.
        torch_dtype: A floating dtype or its name; ``None`` and ``"auto"`` are the checkpoint's own.
        quantization_config: transformers' settings for quantizing while loading.
        storage_path: Where names are looked up; see ``core.config.storage_path``.
        fully_parallel: Import and prepare the model's class while the bytes move.
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
        DeviceUnavailable: ``device_map`` asks for an accelerator.
        StoreUnreachable: A store is required, and none answers.
    """
    # Also before the thread starts: two threads that import torch at once can see half of it.
    dtype = parse_dtype(model_kwargs.pop("dtype", torch_dtype))
    device = _device_of(device_map)
    path = resolve_model(model_path, storage_path)
    prepare = functools.partial(
        make_skeleton, path, hf_model_class, trust_remote_code=trust_remote_code, **model_kwargs
    )
    load = functools.partial(
        load_tensors, model_path, device, storage_path=storage_path, store=store
    )
    if fully_parallel:
        preparing = _in_background(prepare)
        tensors = load()
        skeleton = preparing.result()
    else:
        skeleton = prepare()
        tensors = load()
    return build_model(
        skeleton,
        tensors,
        torch_dtype=dtype,
        quantization_config=quantization_config,
        attn_implementation=attn_implementation,
    )


def _device_of(device_map: Any) -> str:
    """Name the one device that a map means.

    Raises:
        ConfigError: It is no device map, or it means several devices.
        DeviceUnavailable: It means an accelerator.
    """
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    names = {_place_name(place) for place in places}
    if len(names) != 1:
        raise ConfigError(
            f"device_map `{device_map}` does not name one device",
            hint='use device_map="cpu", or {"": "cpu"}',
        )
    return str(require_cpu(names.pop()))


def _place_name(place: Any) -> str:
    if place is None:
        return "cpu"
    if isinstance(place, int):
        return f"{_accelerator() or 'cuda'}:{place}"
    if place in _PLACEMENTS:
        return _accelerator() or "cpu"
    return str(place)


def _accelerator() -> str | None:
    """The kind of accelerator that torch can use here."""
    import torch

    for kind in ("npu", "cuda"):
        runtime = getattr(torch, kind, None)
        if runtime is not None and runtime.is_available():
            return kind
    return None


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Run work in a thread that an interrupted load does not wait for; only the exit does.

    As a daemon it could be in torch when the interpreter ends, which aborts the process.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name="sllm-skeleton").start()
    return future

"""Save a transformers model: what `save_pretrained` would write, as a converted checkpoint."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllmctl.core.manifest import Origin
from sllmctl.core.write.convert import convert
from sllmctl.core.write.save import save_tensors
from sllmctl.core.write.sources import list_source
from sllmctl.core.write.target import require_replaceable
from sllmctl.errors import CheckpointNotFound, ConfigError
from sllmctl.integrations.hf_build import quiet_transformers

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"


def save_model(model: Any, model_path: str | os.PathLike[str]) -> Path:
    """Save a model as a converted checkpoint, with its configuration and generation settings.

    The model stays where it is. A checkpoint that is there already is replaced in one step; its
    tokenizer and other files stay, as `save_pretrained` would leave them. Weights have the names
    of the model's published checkpoints, so transformers, vLLM and SGLang read the directory.

    Args:
        model: A `PreTrainedModel`, on any device.
        model_path: Directory to write, as a path.

    Returns:
        The directory.

    Raises:
        ConfigError: That is no whole transformers model, or the directory is no checkpoint's.
        CheckpointError: The directory cannot be written.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"a {type(model).__name__} is not a transformers model",
            hint="merge an adapter into its model first; save other tensors with save_tensors",
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"the {type(model).__name__} has adapters, which are not part of its checkpoint",
            hint="merge them into the weights, or remove them",
        )
    target = Path(model_path).expanduser()
    require_replaceable(target, force=True)
    if (target / ADAPTER_CONFIG).exists() and not (target / "config.json").exists():
        raise ConfigError(
            f"`{target}` holds an adapter, and no model: it is not replaced",
            hint="choose another place for the model",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = _disk_tensors(model)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.save-") as name:
        staging = Path(name)
        # An empty dict of weights makes transformers write all that goes beside them.
        with quiet_transformers():
            model.save_pretrained(staging, state_dict=None if tensors is None else {})
        if tensors is not None:
            save_tensors(tensors, target, files=_other_files(target) | _read_files(staging))
            return target
        keep_others(target, staging)
        convert(staging, target, force=True, verify=False, origin=Origin())
    return target


def _disk_tensors(model: Any) -> dict[str, torch.Tensor] | None:
    """The model's tensors by the names of its checkpoint, or None where only it can tell them.

    What quantized, sharded and offloaded models write is buried in `save_pretrained`, as are the
    other names that some classes of transformers 4.x give; such a model is written twice.
    """
    import torch
    import transformers

    state = model.state_dict()
    plain = all(type(value) is torch.Tensor and not value.is_meta for value in state.values())
    if not plain or getattr(model, "hf_quantizer", None) is not None:
        return None
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = _untied(state, _declared_ties(model, state))
    try:
        # 5.x fuses weights while it loads: the experts of a layer become one parameter.
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        rename = "_fix_state_dict_keys_on_save"
        renames = getattr(type(model), rename) is not getattr(transformers.PreTrainedModel, rename)
        return None if renames or getattr(model, "_checkpoint_conversion_mapping", None) else state
    return dict(revert_weight_conversion(model, state))


def _declared_ties(model: Any, state: Iterable[str]) -> set[str]:
    """Names that the model's class and configuration tie to another."""
    if hasattr(model, "all_tied_weights_keys"):
        return set(model.all_tied_weights_keys)
    # transformers 4.x: patterns, which count where the configuration says so.
    if not model.config.get_text_config(decoder=True).tie_word_embeddings:
        return set()
    patterns = model._tied_weights_keys or ()
    return {name for name in state if any(re.search(pattern, name) for pattern in patterns)}


def _untied(state: dict[str, torch.Tensor], declared: set[str]) -> dict[str, torch.Tensor]:
    """Drop the names that are tied to others: loaders neither need nor expect them.

    What is shared without the configuration saying so is copied, since it would be missing after
    a load.
    """
    seen: set[tuple[Any, ...]] = set()
    shared: set[str] = set()
    for name in sorted(state, key=lambda name: name in declared):
        tensor = state[name]
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            shared.add(name)
        seen.add(place)
    return {
        name: tensor.clone() if name in shared else tensor
        for name, tensor in state.items()
        if name not in shared or name not in declared
    }


def keep_others(target: Path, staging: Path) -> None:
    """Copy what lies beside the weights that are to be replaced, unless something takes its place.

    Args:
        target: The directory that is to be replaced, which may not be there yet.
        staging: Where its successor is being made.
    """
    for file, content in _other_files(target).items():
        if not (staging / file).exists():
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / file).write_bytes(content)


def _other_files(target: Path) -> dict[str, bytes]:
    """What lies beside the weights of a checkpoint, or ahead of them."""
    try:
        others = list_source(target).others
    except CheckpointNotFound:
        return _read_files(target)
    return {file.name: file.path.read_bytes() for file in others}


def _read_files(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }

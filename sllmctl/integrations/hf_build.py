"""Build a transformers model from tensors that are already in memory.

transformers' own pipeline does the building (fused experts, ties, buffers, quantizers). A missing
weight, which it fills with random numbers and a log line, is an error here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllmctl.core.header import shown
from sllmctl.errors import CheckpointError, CheckpointNotFound, ConfigError
from sllmctl.integrations.hf_devices import no_second_allocation

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_SHOWN_NAMES = 5
_REPORT_MARKS = (
    "LOAD REPORT",
    "newly initialized",
    "were not used when initializing",
    "checkpoint seem corrupted",
)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What is known of a model before its weights arrive.

    Attributes:
        path: The checkpoint's directory.
        model_class: The concrete class, such as ``Qwen3ForCausalLM``.
        config: Its configuration.
        init_kwargs: Arguments for the constructor of the class.
    """

    path: Path
    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    init_kwargs: dict[str, Any]


def make_skeleton(
    path: Path,
    hf_model_class: str | type[Any] = "AutoModelForCausalLM",
    *,
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> Skeleton:
    """Read the configuration of a checkpoint and find the class that it means.

    Args:
        path: Directory with a ``config.json``.
        hf_model_class: An Auto class or a concrete one, or the name of either in ``transformers``.
        trust_remote_code: Run the modelling code that comes with the checkpoint.
        model_kwargs: Settings that override the configuration's. What it does not know goes to the
            constructor of the class, as in ``from_pretrained``.

    Raises:
        CheckpointNotFound: There is no ``config.json``.
        ConfigError: transformers cannot make such a model of this configuration.
    """
    import transformers

    if not (path / "config.json").is_file():
        raise CheckpointNotFound(
            f"`{path}` has no config.json, which says what model the tensors belong to",
            hint="convert the whole model directory, or load the tensors with sllmctl.load_tensors",
        )
    asked = _find_class(hf_model_class)
    architectures: Any = None
    try:
        config, init_kwargs = transformers.AutoConfig.from_pretrained(
            str(path),
            return_unused_kwargs=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **model_kwargs,
        )
        architectures = config.architectures
        model_class = asked
        if not issubclass(asked, transformers.PreTrainedModel):
            model_class, config = _choose_class(asked, config, trust_remote_code)
    except Exception as exc:  # whatever a foreign configuration does to the class that reads it
        raise ConfigError(
            _refusal(asked, path, exc),
            hint=f"its config.json names {', '.join(architectures)}: see hf_model_class"
            if architectures
            else "a newer transformers may support it; a checkpoint with its own code needs "
            "trust_remote_code=True",
        ) from exc
    return Skeleton(path, model_class, config, init_kwargs)


def build_model(
    skeleton: Skeleton,
    tensors: Mapping[str, torch.Tensor],
    *,
    torch_dtype: torch.dtype | str | None = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    device_map: Mapping[str, str] | None = None,
) -> Any:
    """Make a model whose parameters are these tensors; only another dtype makes copies.

    Args:
        skeleton: From ``make_skeleton``.
        tensors: The checkpoint's names and tensors, where they are to be. Aliases may be in it.
        torch_dtype: A floating dtype or its name; ``None`` and ``"auto"`` are the checkpoint's own.
        quantization_config: transformers' settings for quantizing while loading.
        attn_implementation: transformers' name of an attention kernel.
        device_map: Devices by module, of a model that is not in host memory alone. With several,
            it gets the hooks that carry activations from one to the next.

    Returns:
        The ``PreTrainedModel``, in evaluation mode, with the checkpoint's generation
        settings.

    Raises:
        CheckpointError: A weight is missing, unexpected or of another shape; the message names it.
        ConfigError: ``torch_dtype`` is none, or transformers can do nothing with the rest.
    """
    import torch

    _require_scales(skeleton, tensors)
    model_class: Any = skeleton.model_class
    options: dict[str, Any] = {_dtype_keyword(): parse_dtype(torch_dtype)}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if device_map is not None:
        options["device_map"] = dict(device_map)
    no_warmup = nullcontext() if device_map is None else no_second_allocation()
    with quiet_transformers() as reports, no_warmup:
        try:
            model, info = model_class.from_pretrained(
                None,
                config=skeleton.config,
                state_dict=dict(tensors),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported in `info`, with the names, not raised
                local_files_only=True,
                **options,
                **skeleton.init_kwargs,
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as exc:  # transformers and its quantizers raise what they like
            if problems := _reported(reports):
                raise _misfit(skeleton, problems) from exc
            raise ConfigError(
                _refusal(model_class, skeleton.path, exc),
                hint="install what it asks for"
                if isinstance(exc, ImportError)
                else "its config.json or an argument does not fit that class",
            ) from exc
    problems = _problems(info)
    if problems:
        raise _misfit(skeleton, problems)
    model.name_or_path = model.config.name_or_path = str(skeleton.path)
    if model.can_generate() and "generation_config" not in skeleton.init_kwargs:
        _set_generation_config(model, skeleton.path)
    return model


def parse_dtype(value: torch.dtype | str | None) -> torch.dtype | str:
    """Read a dtype argument: a ``torch.dtype``, its name, or ``"auto"`` (also None).

    Raises:
        ConfigError: It names no floating dtype of torch.
    """
    import torch

    if value is None or value == "auto":
        return "auto"
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"torch_dtype `{value}` is not a floating dtype of torch",
            hint="use torch.bfloat16, torch.float16, torch.float32 or their names",
        )
    return dtype


@contextmanager
def quiet_transformers() -> Iterator[list[str]]:
    """Hold back transformers' progress bars, and its reports of misfits, which are yielded."""
    import transformers

    bars: Any = transformers.utils.logging
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not any(mark in text for mark in _REPORT_MARKS):
            return True
        reports.append(text)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    had_bars = bars.is_progress_bar_enabled()
    logger.addFilter(keep)
    bars.disable_progress_bar()
    try:
        yield reports
    finally:
        logger.removeFilter(keep)
        if had_bars:
            bars.enable_progress_bar()


def _find_class(name: str | type[Any]) -> type[Any]:
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) else name
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ConfigError(
            f"transformers {transformers.__version__} has no model class `{name}`",
            hint="use AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel or a class it defines",
        )
    return found


def _refusal(model_class: type[Any], path: Path, exc: Exception) -> str:
    import transformers

    reason = str(exc).strip().partition("\n")[0]
    return (
        f"transformers {transformers.__version__} makes no {model_class.__name__} "
        f"of `{path}`: {reason}"
    )


def _choose_class(asked: Any, config: Any, trust_remote_code: bool) -> tuple[type[Any], Any]:
    """The class that an Auto class chooses for a configuration, and the configuration it wants."""
    import torch

    mapping = getattr(asked, "_model_mapping", None)
    if mapping is not None and not hasattr(config, "auto_map") and not config.sub_configs:
        found = mapping.get(type(config), None)
        if isinstance(found, type):
            return found, config
    # In general an Auto class tells its choice only by making one, which takes a while even on the
    # meta device. Of a composite configuration it may take the part that describes the text.
    with torch.device("meta"):
        made = asked.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    return type(made), config if type(made.config) is type(config) else made.config


def _dtype_keyword() -> str:
    import transformers
    from packaging.version import Version

    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def _problems(info: Mapping[str, Any]) -> list[str]:
    """What the loading info finds wrong, one phrase a kind; empty when all fits."""
    problems = [
        f"{word}: {_names(info[key])}"
        for word, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"))
        if info.get(key)
    ]
    if mismatched := info.get("mismatched_keys"):
        # 4.x gives names; 5.x gives (name, shape in the checkpoint, shape in the model).
        texts = [
            f"{shown(item[0])} is {list(item[1])} instead of {list(item[2])}"
            if isinstance(item, tuple)
            else shown(item)
            for item in sorted(mismatched)
        ]
        problems.append(f"of another shape: {listed(texts)}")
    if messages := info.get("error_msgs"):
        problems.append(listed(list(messages)))
    return problems


def _misfit(skeleton: Skeleton, problems: Iterable[str]) -> CheckpointError:
    architectures = skeleton.config.architectures
    name = skeleton.model_class.__name__
    return CheckpointError(
        f"the weights in `{skeleton.path}` do not fit a {name}: {'; '.join(problems)}",
        hint=f"its config.json names {', '.join(architectures)}: see hf_model_class"
        if architectures and name not in architectures
        else "its config.json and its weights belong to different models, or one is damaged",
    )


def _reported(reports: Iterable[str]) -> list[str]:
    """What transformers reported before it gave up, from its rows ``name | MISSING | …``."""
    rows = [line.split("|") for report in reports for line in report.splitlines()]
    problems = []
    for mark, word in (("CONVERSION", "not convertible"), ("MISSING", "missing")):
        names = [row[0].strip() for row in rows if len(row) > 1 and mark in row[1]]
        if names:
            problems.append(f"{word}: {_names(names)}")
    return problems


def _require_scales(skeleton: Skeleton, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a quantized weight that has lost its scale: transformers 5.x would do without.

    Raises:
        CheckpointError: Some weights of eight bits have one beside them, and others have none.
    """
    import torch

    if getattr(skeleton.config, "quantization_config", None) is None:
        return
    eight_bits = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    names = [
        name
        for name, tensor in tensors.items()
        # What a weight has beside it may be of eight bits itself.
        if tensor.dtype in eight_bits and not name.endswith(("_scale", "_scale_inv", "_zero_point"))
    ]
    for suffix in ("_scale_inv", "_scale"):
        missing = [name + suffix for name in names if name + suffix not in tensors]
        if missing and len(missing) < len(names):
            raise _misfit(skeleton, [f"missing: {_names(missing)}"])


def _names(names: Iterable[str]) -> str:
    return listed([shown(name) for name in sorted(names)])


def listed(texts: list[str]) -> str:
    """Join the first few, and count the rest."""
    more = len(texts) - _SHOWN_NAMES
    return ", ".join(texts[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _set_generation_config(model: Any, path: Path) -> None:
    """Do what ``from_pretrained`` does with the directory that it was not given."""
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    else:
        # Old checkpoints keep these settings in config.json, from which 5.x drops them.
        model.generation_config = GenerationConfig.from_pretrained(
            str(path), config_file_name="config.json", _from_model_config=True
        )

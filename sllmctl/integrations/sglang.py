"""SGLang's entry point ``sglang.srt.plugins``: ``{"sllm": {...}}`` in the loader's extra config."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

KEY = "sllm"
"""In ``--model-loader-extra-config``; what it holds are the options of ``EngineOptions``."""

_CHOICE = "sglang.srt.model_loader.loader.get_model_loader"
_CONFIG = "sglang.srt.configs.load_config.LoadConfig.__post_init__"
_registered = False


def register() -> None:
    """Hook into the choice of SGLang's loader, 0.5.11 or later; opens nothing.

    SGLang calls it in its main process and in every worker. A hook that cannot be set is no more
    than a line in its log, so that a model would be loaded past us: whoever asks for us is then
    refused.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    try:
        pkgutil.resolve_name(_CHOICE)
    except (ImportError, AttributeError):
        HookRegistry.register(_CONFIG, _refuse, HookType.BEFORE)
    else:
        HookRegistry.register(_CHOICE, _choose, HookType.AROUND)


def _choose(original: Callable[..., Any], load_config: Any, *args: Any, **kwargs: Any) -> Any:
    if KEY not in (load_config.model_loader_extra_config or {}):
        return original(load_config, *args, **kwargs)
    from sllmctl.integrations.sglang_loader import SllmLoader

    return SllmLoader(load_config)


def _refuse(load_config: Any) -> None:
    # Here it is text or a mapping: the key is in both.
    if KEY in (load_config.model_loader_extra_config or {}):
        raise RuntimeError(
            f"this SGLang has no {_CHOICE}, which sllmctl's loader hooks into: "
            "load without it, or with a version that sllmctl names as tried"
        )

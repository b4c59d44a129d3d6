"""What is imported before the first sample, so that no sample imports it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from sllmctl.bench.ways import PEERS, Subject
from sllmctl.errors import SllmError

log = logging.getLogger(__name__)
_NEEDED = ("torch", "safetensors.torch", "transformers")


def import_times(subject: Subject) -> dict[str, float]:
    """Import what the ways need, in order, and time each beyond those before it, in seconds."""
    modules = [*_NEEDED, *(way.module for way in PEERS)]
    if importlib.util.find_spec("transformers") is not None:
        modules.append("sllmctl.transformers")
    os.environ.setdefault("RUNAI_STREAMER_LOG_LEVEL", "ERROR")  # read when it is imported
    times: dict[str, float] = {}
    for module in dict.fromkeys(modules):
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            continue
        started = time.perf_counter()
        try:
            importlib.import_module(module)
        except Exception as exc:  # a peer's import may fail in any way: its rows say how
            if module in _NEEDED:
                raise SllmError(f"cannot import {module}: {exc}") from exc
            log.debug("cannot import %s: %s", module, exc)
            continue
        times[module] = time.perf_counter() - started
    if "transformers" in times and (subject.path / "config.json").is_file():
        started = time.perf_counter()
        _import_model_class(subject.path)
        times["the model's class in transformers"] = time.perf_counter() - started
    return times


def _import_model_class(path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    hide: Callable[[], None] = logging.disable_progress_bar
    hide()
    try:
        kind = type(AutoConfig.from_pretrained(path))
        AutoModelForCausalLM._model_mapping.get(kind, None)
    except Exception as exc:
        log.debug("no model class for %s: %s", path, exc)

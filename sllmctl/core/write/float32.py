"""Which tensors of a model stay in float32 when the rest is cast to a shorter dtype."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

KNOWN_NAMES = (
    *("inv_freq", "running_mean", "running_var", "e_score_correction_bias"),
    *("A_log", "dt_bias"),
)
"""Last parts of names that stay in float32 whatever the model: positions of rotary embeddings,
statistics of batch norms, biases of expert routers, time constants of state-space layers."""

log = logging.getLogger(__name__)


def kept_in_float32(config: dict[str, Any], dtype: str) -> Callable[[str], bool]:
    """Return a test by tensor name.

    What transformers keeps in float32 stays (``_keep_in_fp32_modules`` for float16, its strict
    sibling for both short dtypes, parameters that the model makes in float32 by itself), and so do
    buffers, which a model fills for its own use. Where transformers does not know the model,
    ``KNOWN_NAMES`` decides alone.

    Args:
        config: The model's ``config.json``; empty when there is none.
        dtype: What the rest becomes.
    """
    if dtype == "float32":
        return lambda name: False
    patterns, names = _ask_transformers(config, dtype)
    listed = re.compile("|".join(p.replace("*", ".*") for p in patterns)) if patterns else None
    ends = tuple("." + name.rpartition(".")[2] for name in names)

    def keep(name: str) -> bool:
        if name.rpartition(".")[2] in KNOWN_NAMES or (listed and listed.search(name)):
            return True
        # A base model's names lack the prefix of the full model's, or the other way round.
        return name.endswith(ends) and any(
            name == known or name.endswith("." + known) or known.endswith("." + name)
            for known in names
        )

    return keep


def _ask_transformers(config: dict[str, Any], dtype: str) -> tuple[list[str], set[str]]:
    """Patterns of names, and whole names of parameters and buffers, that stay in float32.

    Asked in a child process: transformers takes more memory than the conversion itself.
    """
    if not config.get("architectures"):
        return [], set()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sllmctl.core.write.float32", dtype],
            input=json.dumps(config),
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )
        patterns, names = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as exc:
        log.warning("transformers cannot be asked what stays in float32: %s", exc)
        return [], set()
    return patterns, set(names)


def _answer(config: dict[str, Any], dtype: str) -> tuple[list[str], list[str]]:
    import torch
    import transformers

    architectures = config["architectures"]
    model_class = getattr(transformers, str(architectures[0]), None)
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        return [], []
    names: set[str] = set()
    model: Any = model_class
    try:
        settings: Any = model_class.config_class
        torch.set_default_dtype(getattr(torch, dtype))
        with torch.device("meta"):
            model = model_class(settings.from_dict(config))
    except Exception as exc:  # whatever a foreign configuration does to the class that reads it
        log.info("transformers cannot build %s (%s): its class is asked", architectures, exc)
    else:
        names |= {n for n, buffer in model.named_buffers() if buffer.is_floating_point()}
        names |= {n for n, weight in model.named_parameters() if weight.dtype == torch.float32}
    lists = [getattr(model, "_keep_in_fp32_modules_strict", None)]
    if dtype == "float16":
        lists.append(getattr(model, "_keep_in_fp32_modules", None))
    return _flatten(lists), sorted(names)


def _flatten(lists: Iterable[Iterable[str] | None]) -> list[str]:
    return [pattern for patterns in lists if patterns for pattern in patterns]


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_answer(json.load(sys.stdin), sys.argv[1])) + "\n")

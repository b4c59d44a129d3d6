"""What sllm-store's `load_model` wants to know of a model besides its tensors.

Its own writer has the model in memory. Here transformers is asked what the configuration makes,
without weights: which modules stay on one device, and which parameters are tied.

Source: sllm_store 0.8.0, ``get_no_split_modules`` and ``get_tied_no_split_modules`` in utils.py.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sllmctl.core.dtypes import DTYPE_BITS
from sllmctl.core.header import shown
from sllmctl.core.sllm_store import MODULES_NAME, TIED_NAME
from sllmctl.core.write.sources import Weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Modules:
    """A model, as far as it matters for placing it on devices.

    Attributes:
        parameters: For each module that stays whole, the names of its parameters.
        tied: Groups of parameters that are one.
        elements: Number of elements of each parameter.
    """

    parameters: dict[str, list[str]]
    tied: list[list[str]]
    elements: dict[str, int]

    def missing_aliases(self, stored: Mapping[str, int]) -> dict[str, str]:
        """Tied names that a checkpoint leaves out, each with the name that it stores."""
        found: dict[str, str] = {}
        for group in self.tied:
            kept = next((name for name in group if name in stored), None)
            if kept is not None:
                found |= {name: kept for name in group if name not in stored}
        return found

    def files(self, stored: Mapping[str, int], itemsize: int) -> dict[str, bytes]:
        """``no_split_modules.json`` and ``tied_no_split_modules.json``, by name.

        Args:
            stored: Bytes of every tensor, tied ones included.
            itemsize: Bytes of an element of a parameter that goes by another name there.
        """

        def nbytes(name: str) -> int:
            return stored.get(name, self.elements[name] * itemsize)

        sizes = {module: sum(map(nbytes, names)) for module, names in self.parameters.items()}
        owner = {name: module for module, names in self.parameters.items() for name in names}
        tied = [
            ([owner[name] for name in group], nbytes(group[0]))
            for group in self.tied
            if all(name in owner for name in group)
        ]
        return {MODULES_NAME: json.dumps(sizes).encode(), TIED_NAME: json.dumps(tied).encode()}


def complete_for_sllm_store(
    weights: Weights, config: Mapping[str, Any]
) -> tuple[Weights, dict[str, bytes], list[str]]:
    """Add to weights what safetensors checkpoints leave to the model's class.

    Args:
        weights: To be written.
        config: The model's ``config.json``; empty when there is none, as for an adapter.

    Returns:
        The weights with every tied name; the files that describe the modules, by name; and what
        a person should know.
    """
    modules = describe_modules(config)
    if modules is None:
        note = f"transformers does not know the model, so there is no `{MODULES_NAME}`: "
        note += "load_model of sllm-store needs it for fully_parallel"
        return weights, {}, [note] if config else []
    stored = {spec.name: spec.nbytes for spec in weights.tensors}
    stored |= {alias: stored[kept] for alias, kept in weights.aliases.items()}
    added = modules.missing_aliases(stored)
    stored |= {alias: stored[kept] for alias, kept in added.items()}
    largest = max(weights.tensors, key=lambda spec: spec.nbytes, default=None)
    itemsize = DTYPE_BITS[largest.dtype] // 8 if largest else 1
    warning = names_warning(modules, stored)
    return (
        replace(weights, aliases={**weights.aliases, **added}),
        modules.files(stored, itemsize),
        [warning] if warning else [],
    )


def describe_modules(config: Mapping[str, Any]) -> Modules | None:
    """Ask transformers, in a child process, what a configuration makes; None if it cannot tell."""
    if not config.get("architectures"):
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sllmctl.core.write.sllm_store_modules"],
            input=json.dumps(config),
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as exc:
        log.info("transformers cannot be asked for a model's modules: %s", exc)
        return None
    return Modules(**answer) if answer else None


def names_warning(modules: Modules, stored: Mapping[str, int]) -> str | None:
    """Say that a checkpoint's names are not the model's, which sllm-store would not find."""
    unknown = [name for name in modules.elements if name not in stored]
    if 2 * len(unknown) <= len(modules.elements):
        return None
    return (
        f"the model calls its weights otherwise, such as {shown(unknown[0])}: load_model of "
        "sllm-store will not find them, load_dict will"
    )


def _answer(config: dict[str, Any]) -> dict[str, Any] | None:
    import torch
    import transformers

    model_class = getattr(transformers, str(config["architectures"][0]), None)
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        return None
    settings: Any = model_class.config_class
    with torch.device("meta"):
        model: Any = model_class(settings.from_dict(config))
        model.tie_weights()
    whole = set(model._no_split_modules or ())
    parameters: dict[str, list[str]] = {}

    def walk(module: torch.nn.Module, path: str) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if type(child).__name__ in whole or not any(True for _ in child.children()):
                parameters[inner] = [f"{inner}.{n}" for n, _ in child.named_parameters()]
            else:
                walk(child, inner)

    walk(model, "")
    names: dict[int, list[str]] = {}
    elements: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        elements[name] = parameter.numel()
    tied = sorted(sorted(group) for group in names.values() if len(group) > 1)
    return {"parameters": parameters, "tied": tied, "elements": elements}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_answer(json.load(sys.stdin))) + "\n")

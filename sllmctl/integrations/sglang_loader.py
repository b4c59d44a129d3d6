"""The loader that SGLang runs, in every worker: `SllmLoader`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.model_loader.loader import DefaultModelLoader
from torch import nn

from sllmctl.errors import ConfigError
from sllmctl.integrations.engine_complete import DRAFT_SHARED, require_complete
from sllmctl.integrations.engine_copy import InitialValues, WeightWrites
from sllmctl.integrations.engine_source import (
    EngineOptions,
    EngineWeights,
    describe,
    find_model,
    telling_hints,
)
from sllmctl.integrations.engine_threads import tasks_run_here
from sllmctl.integrations.sglang import KEY

log = logging.getLogger("sglang.srt.sllmctl")

# They have defaults.
_CACHE_SCALES = ("k_scale", "v_scale")


class SllmLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads weights from the store or from disk; cutting them for a rank stays the model's job.

    SGLang before 0.5.11 takes the class itself: ``sgl.Engine(load_format=SllmLoader)``.
    """

    def __init__(self, load_config: Any) -> None:
        ours = copy.copy(load_config)
        extra = dict(ours.model_loader_extra_config or {})
        with telling_hints():
            self._options = EngineOptions.parse(extra.pop(KEY, {}))
        self._weights: EngineWeights | None = None
        self._initial = InitialValues()
        ours.model_loader_extra_config = extra  # SGLang's own loader knows no key of ours
        super().__init__(ours)

    def download_model(self, model_config: Any) -> None:
        """See that the weights are there. Nothing is downloaded: `sllmctl convert` does that.

        Raises:
            SllmError: As ``find_model`` raises them.
        """
        find_model(self._options, model_config.model_path)

    def load_model(self, *, model_config: Any, device_config: Any) -> nn.Module:
        """Open the weights, and only then let SGLang build the model and fill it.

        Raises:
            CheckpointError: The checkpoint lacks weights of the model; it names them.
            SllmError: As ``EngineWeights`` raises them.
        """
        try:
            with telling_hints():
                self._open(model_config)
                with self._initial:
                    model: nn.Module = super().load_model(
                        model_config=model_config, device_config=device_config
                    )
            return model
        finally:
            if self._weights is not None:
                self._weights.close()
                self._weights = None

    def _open(self, model_config: Any) -> None:
        if getattr(model_config, "modelopt_quant", None):
            raise ConfigError(
                "ModelOpt quantizes what SGLang's own loader reads",
                hint=f"leave `{KEY}` out of the loader's extra configuration",
            )
        if self._options.rank_state != "off":
            raise ConfigError(
                "a rank state is what vLLM's workers write and read",
                hint="leave `rank_state` out: each SGLang worker moves its own part alone",
            )
        rank, ranks = _place()
        options = self._options
        if _is_separate_draft(model_config):
            # Of the two models it is the other that one `model` means.
            options = replace(options, model=None)
        found = find_model(options, model_config.model_path)
        self._weights = EngineWeights(found, options, rank=rank, ranks=ranks)
        log.info(
            "sllm: `%s`, process %d of %d here: %s",
            found.model,
            rank,
            ranks,
            describe(self._weights.stats),
        )

    def _get_all_weights(
        self, model_config: Any, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        weights = self._weights
        if weights is None:
            raise ConfigError("the weights were asked for outside of a load")
        self._initial.stop()
        _check_what_loads(
            model, weights, self._options, model_config, prefilled=self._initial.names(model)
        )
        return self._iterate(weights, model)

    def _iterate(
        self, weights: EngineWeights, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = weights.tensors()
        layer = getattr(self.load_config, "draft_model_idx", None)
        if layer is not None:
            tensors = self._filter_mtp_weights(tensors, "", layer)
        yield from tensors
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)


def _check_what_loads(
    model: nn.Module,
    weights: EngineWeights,
    options: EngineOptions,
    model_config: Any,
    *,
    prefilled: Set[str],
) -> None:
    """Have the model's next ``load_weights`` watched, and refused if it leaves bytes out.

    Between it and the processing of what it loaded, which cannot be told apart afterwards, SGLang
    has no place of ours in all its versions.
    """
    load_weights: Any = model.load_weights

    def watched(*args: Any, **kwargs: Any) -> Any:
        del model.load_weights  # the instance's, which covers the class's
        with tasks_run_here(), WeightWrites(model) as writes:
            loaded = load_weights(*args, **kwargs)
        require_complete(
            model,
            writes,
            loaded if isinstance(loaded, Set) else None,  # each model returns what it likes
            weights.names,
            where=f"`{weights.found.model}`",
            level=options.check,
            optional=set(_optional(model, model_config)),
            prefilled=prefilled,
        )
        return loaded

    model.load_weights = watched  # type: ignore[assignment]


def _optional(model: nn.Module, model_config: Any) -> Iterator[str]:
    """Names of parameters that keep their initial values where the checkpoint has none."""
    shared = DRAFT_SHARED if getattr(model_config, "is_draft_model", False) else ()
    for name, _ in model.named_parameters():
        if name.endswith((*_CACHE_SCALES, *shared)):
            yield name


def _place() -> tuple[int, int]:
    """This worker among those of the engine on this machine, and how many they are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    here = max(torch.distributed.get_world_size() // _nodes(), 1)
    return torch.distributed.get_rank() % here, here


def _is_separate_draft(model_config: Any) -> bool:
    """Whether a model drafts for one that has weights elsewhere."""
    if not getattr(model_config, "is_draft_model", False):
        return False
    target = getattr(_server_arguments(), "model_path", model_config.model_path)
    return bool(target != model_config.model_path)


def _nodes() -> int:
    return max(int(getattr(_server_arguments(), "nnodes", 1)), 1)


def _server_arguments() -> Any:
    try:
        from sglang.srt.runtime_context import get_server_args
    except ImportError:  # older versions
        try:
            from sglang.srt.server_args import get_global_server_args as get_server_args
        except ImportError:  # 0.5.3 keeps it from its loaders
            return None
    return get_server_args()

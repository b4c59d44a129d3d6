"""The loader that vLLM runs for ``--load-format sllm``, in every worker."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from sllmctl.errors import ConfigError, SllmError
from sllmctl.integrations.engine_complete import require_complete
from sllmctl.integrations.engine_copy import WeightWrites
from sllmctl.integrations.engine_source import (
    EngineOptions,
    EngineWeights,
    describe,
    with_hint,
)

log = logging.getLogger("vllm.sllmctl")

# Scales of the KV cache keep their defaults when a checkpoint has none; the bound of fbgemm's
# inputs comes from the configuration. Source: vLLM 0.32, DefaultModelLoader.
_OPTIONAL_ENDS = ("k_scale", "v_scale", "q_scale", "prob_scale", "input_scale_ub")
# A draft model without them shares the target's. Source: vLLM 0.32, v1/spec_decode.
_DRAFT_SHARED = ("embed_tokens.weight", "lm_head.weight")


class SllmLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads weights from the store or from disk; cutting them for a rank stays the model's job."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._options = EngineOptions.parse(load_config.model_loader_extra_config or {})
        self._weights: EngineWeights | None = None
        self.local_expert_ids: set[int] | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Open the weights, and only then let vLLM build the model and fill it."""
        model_config = kwargs.get("model_config") or kwargs["vllm_config"].model_config
        try:
            self._open(model_config)
            return super().load_model(*args, **kwargs)
        except SllmError as exc:
            exc.message = with_hint(exc)
            raise
        finally:
            self._close()

    def download_model(self, model_config: Any) -> None:
        """See that the weights can be loaded. Nothing is downloaded: `sllmctl convert` does that.

        Raises:
            SllmError: As ``EngineWeights`` raises them.
        """
        EngineWeights(self._options, model_config.model).close()

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fill a model, and refuse one that is not filled to the last byte.

        Raises:
            CheckpointError: The checkpoint lacks weights of the model; it names them.
            SllmError: As ``EngineWeights`` raises them.
        """
        weights = self._open(model_config)
        try:
            with WeightWrites(model) as writes:
                loaded = model.load_weights(self._iterate(weights, model_config, model))
            require_complete(
                model,
                writes,
                loaded,
                weights.names,
                where=f"`{weights.model}`",
                level=self._options.check,
                optional=_optional_for(model_config),
            )
        finally:
            self._close()

    def get_all_weights(
        self, model_config: Any, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)`` on cpu: what vLLM's ``reload_weights`` takes.

        The caller copies them as it likes, so that an accelerator gets ordinary memory.
        """
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        weights = EngineWeights(self._options, model_config.model)
        try:
            for name, tensor in self._iterate(weights, model_config, model):
                yield name, tensor if on_cpu else tensor.clone()
        finally:
            weights.close()

    def _open(self, model_config: Any) -> EngineWeights:
        if self._weights is None:
            if model_config.quantization == "torchao":
                raise ConfigError(
                    "weights that torchao flattened are put together by vLLM's own loader alone",
                    hint="use --load-format auto",
                )
            rank, ranks = _place()
            self._weights = EngineWeights(self._options, model_config.model, rank=rank, ranks=ranks)
            # Speculative decoding loads a second model with the same options.
            if self._options.model is not None:
                self.load_config.model_loader_extra_config["model"] = {
                    model_config.model: self._options.model
                }
            log.info(
                "sllm: `%s`, process %d of %d here: %s",
                self._weights.model,
                rank,
                ranks,
                describe(self._weights.stats),
            )
        return self._weights

    def _close(self) -> None:
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    def _iterate(
        self, weights: EngineWeights, model_config: Any, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        skip = self._expert_filter(model_config)
        for name, tensor in weights.tensors():
            if not skip(name):
                yield name, tensor
        for source in getattr(model, "secondary_weights", ()):
            yield from DefaultModelLoader(type(self.load_config)())._get_weights_iterator(source)

    def _expert_filter(self, model_config: Any) -> Any:
        """Whether a tensor belongs to an expert of another rank; never before vLLM 0.20.

        vLLM's own loader decides: vllm-ascend tells it so when experts move between ranks.
        """
        try:
            from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
        except ImportError:
            return lambda name: False
        DefaultModelLoader._init_ep_weight_filter(self, model_config)
        return lambda name: should_skip_weight(name, self.local_expert_ids)


def _optional_for(model_config: Any) -> Any:
    draft = getattr(model_config, "runner_type", None) == "draft"

    def optional(name: str, parameter: torch.Tensor) -> bool:
        return name.endswith(_OPTIONAL_ENDS) or (draft and name.endswith(_DRAFT_SHARED))

    return optional


def _place() -> tuple[int, int]:
    """This worker among those of the engine on this machine, and how many they are."""
    from vllm.distributed import get_world_group

    group = get_world_group()
    return int(group.local_rank), max(int(group.world_size), 1)

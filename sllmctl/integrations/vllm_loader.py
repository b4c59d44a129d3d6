"""The loader that vLLM runs for ``--load-format sllm``, in every worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from sllmctl.errors import CheckpointError, ConfigError, SllmError
from sllmctl.integrations.engine_complete import DRAFT_SHARED, require_complete
from sllmctl.integrations.engine_copy import InitialValues, WeightWrites
from sllmctl.integrations.engine_rank import (
    RankKey,
    fill_from_rank_state,
    find_rank_state,
    save_rank_state,
)
from sllmctl.integrations.engine_source import (
    EngineOptions,
    EngineWeights,
    FoundModel,
    describe,
    find_model,
    telling_hints,
    with_hint,
)
from sllmctl.integrations.engine_state import Snapshot
from sllmctl.integrations.engine_threads import tasks_run_here
from sllmctl.integrations.vllm_rank import announce, rank_key, require_plain_state

log = logging.getLogger("vllm.sllmctl")

# fbgemm builds it from the configuration. Source: vLLM 0.32, DefaultModelLoader.
_CONFIG_BUILT = "input_scale_ub"


class SllmLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads weights from the store or from disk; cutting them for a rank stays the model's job."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        with telling_hints():
            self._options = EngineOptions.parse(load_config.model_loader_extra_config or {})
        self._weights: EngineWeights | None = None
        self._rank_key: RankKey | None = None
        self._initial = InitialValues()
        self.local_expert_ids: set[int] | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Open the weights, and only then let vLLM build the model and fill it."""
        given = dict(zip(("vllm_config", "model_config"), args, strict=False)) | kwargs
        model_config = given.get("model_config") or given["vllm_config"].model_config
        try:
            with telling_hints():
                self._open(model_config)
                with self._initial:
                    return super().load_model(*args, **kwargs)
        finally:
            self._close()

    def download_model(self, model_config: Any) -> None:
        """See that the weights are there. Nothing is downloaded: `sllmctl convert` does that.

        Raises:
            SllmError: As ``find_model`` raises them.
        """
        find_model(self._options, model_config.model)

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fill a model, and refuse one that is not filled to the last byte.

        Raises:
            CheckpointError: The checkpoint lacks weights of the model; it names them.
            SllmError: As ``EngineWeights`` raises them.
        """
        self._initial.stop()
        try:
            if self._fill_from_rank_state(model, model_config):
                return
            weights = self._open(model_config)
            before = self._snapshot(model)
            with tasks_run_here(), WeightWrites(model) as writes:
                loaded = model.load_weights(self._iterate(weights, model_config, model))
            require_complete(
                model,
                writes,
                loaded,
                weights.names,
                where=f"`{weights.found.model}`",
                level=self._options.check,
                optional=set(_optional(model, model_config)),
                prefilled=self._initial.names(model),
            )
            if self._rank_key is not None and self._options.check != "full":
                # Filling from a state asks nothing any more.
                log.warning(
                    'sllm: the rank state is not written: "check" is "%s", and a state is of a '
                    "model that is known to be whole",
                    self._options.check,
                )
            elif self._rank_key is not None and before is not None:
                self._save_rank_state(
                    self._rank_key, model, before, verified=weights.stats.verified
                )
        finally:
            self._close()

    def get_all_weights(
        self, model_config: Any, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Give ``(name, tensor)`` on cpu: what vLLM's ``reload_weights`` takes.

        The weights are opened at once: vLLM takes its model apart before it asks for the first. The
        caller copies them as it likes, so that an accelerator gets ordinary memory.

        Raises:
            SllmError: As ``find_model`` and ``EngineWeights`` raise them.
        """
        with telling_hints():
            weights = self._open_whole(find_model(self._options, model_config.model))
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        tensors = self._iterate(weights, model_config, model)
        return ((name, tensor if on_cpu else tensor.clone()) for name, tensor in tensors)

    def _open(self, model_config: Any) -> EngineWeights:
        """Open a rank's state, or else the checkpoint, unless that is done already."""
        if self._weights is not None:
            return self._weights
        if model_config.quantization == "torchao":
            raise ConfigError(
                "weights that torchao flattened are put together by vLLM's own loader alone",
                hint="use --load-format auto",
            )
        found = find_model(self._options, model_config.model)
        state = self._find_rank_state(found, model_config)
        if state is None:
            self._weights = self._open_whole(found)
        else:
            label = f"{self._options.label_for(found)}, {state.path.name if state.path else ''}"
            self._weights = EngineWeights(state, self._options, label=label)
            _tell(self._weights, *_place())
        if self._options.model is not None:
            # Speculative decoding loads a second model, with these same options.
            self.load_config.model_loader_extra_config["model"] = {
                model_config.model: self._options.model
            }
        return self._weights

    def _open_whole(self, found: FoundModel) -> EngineWeights:
        rank, ranks = _place()
        keeps = self._rank_key is not None and self._options.check == "full"
        weights = EngineWeights(found, self._options, rank=rank, ranks=ranks, keeps=keeps)
        _tell(weights, rank, ranks)
        return weights

    def _close(self) -> None:
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    def _find_rank_state(self, found: FoundModel, model_config: Any) -> FoundModel | None:
        """The state to load, if there is one; sets the key under which to write it if not."""
        self._rank_key = None
        use = self._options.rank_state
        if use == "off":
            return None
        try:
            self._rank_key = rank_key(found, model_config)
            state = find_rank_state(self._rank_key, verified=self._options.verify)
            log.info(announce(self._rank_key))
            return state
        except CheckpointError as exc:
            if use == "require":
                raise
            log.info("sllm: %s", exc)
            return None

    def _fill_from_rank_state(self, model: nn.Module, model_config: Any) -> bool:
        """Fill a model from its rank's state, if there is one that fits."""
        weights = self._open(model_config)
        if self._rank_key is None or weights.found.path != self._rank_key.path:
            return False
        try:
            with WeightWrites(model):
                fill_from_rank_state(model, dict(weights.tensors()), where=weights.found.model)
            return True
        except CheckpointError as exc:
            if self._options.rank_state == "require":
                raise
            # Some setting that is not in the key shapes the model.
            log.warning("sllm: %s: the model is loaded as ever, and the state made anew", exc)
        self._close()
        self._weights = self._open_whole(find_model(self._options, model_config.model))
        return False

    def _snapshot(self, model: nn.Module) -> Snapshot | None:
        """The model as it is; None if no state is to be written."""
        if self._rank_key is None or self._options.check != "full":
            return None
        try:
            return Snapshot.of(model)
        except Exception as exc:  # no memory, say; the load itself does without
            log.warning("sllm: the rank state will not be written: %s", exc)
            return None

    def _save_rank_state(
        self, key: RankKey, model: nn.Module, before: Snapshot, *, verified: bool
    ) -> None:
        try:
            require_plain_state(model)
            save_rank_state(key, model, before, verified=verified)
        except Exception as exc:
            # The model is loaded, and serves; the next start loads as this one did.
            text = with_hint(exc) if isinstance(exc, SllmError) else f"{type(exc).__name__}: {exc}"
            log.warning("sllm: the rank state is not written: %s", text)
        else:
            log.info(announce(key))

    def _iterate(
        self, weights: EngineWeights, model_config: Any, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        skip = self._expert_filter(model_config)
        for name, tensor in weights.tensors():
            if not skip(name):
                yield name, tensor
        for source in getattr(model, "secondary_weights", ()):
            theirs = replace(self.load_config, load_format="auto", model_loader_extra_config={})
            yield from DefaultModelLoader(theirs)._get_weights_iterator(source)

    def _expert_filter(self, model_config: Any) -> Callable[[str], bool]:
        """Whether a tensor belongs to an expert of another rank; never before vLLM 0.20.

        vLLM's own loader decides: vllm-ascend tells it so when experts move between ranks.
        """
        try:
            from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
        except ImportError:
            return lambda name: False
        DefaultModelLoader._init_ep_weight_filter(self, model_config)
        return lambda name: bool(should_skip_weight(name, self.local_expert_ids))


def _tell(weights: EngineWeights, rank: int, ranks: int) -> None:
    log.info(
        "sllm: `%s`, process %d of %d here: %s",
        weights.found.model,
        rank,
        ranks,
        describe(weights.stats),
    )


def _optional(model: nn.Module, model_config: Any) -> Iterator[str]:
    """Names of parameters that keep their initial values where the checkpoint has none."""
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        # The KV cache's scales have defaults, and vLLM itself quantizes what is made on meta.
        if isinstance(method, BaseKVCacheMethod) or getattr(method, "uses_meta_device", False):
            for name, _ in module.named_parameters():
                yield f"{prefix}.{name}" if prefix else name
    shared = DRAFT_SHARED if getattr(model_config, "runner_type", None) == "draft" else ()
    for name, _ in model.named_parameters():
        if name.endswith((_CONFIG_BUILT, *shared)):
            yield name


def _place() -> tuple[int, int]:
    """This worker among those of the engine on this machine, and how many they are."""
    from vllm import config
    from vllm.distributed import get_world_group

    group = get_world_group()
    # A reload may run where no configuration is set, which older versions tell by a default one.
    find = getattr(config, "get_current_vllm_config_or_none", config.get_current_vllm_config)
    parallel = getattr(find(), "parallel_config", None)
    ranks = getattr(parallel, "local_world_size", group.world_size)
    return int(group.local_rank), max(int(ranks), 1)

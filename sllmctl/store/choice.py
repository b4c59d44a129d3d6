"""Where a load's bytes come from: a store that answers, or the files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from sllmctl.core.checkpoint import Checkpoint, open_checkpoint
from sllmctl.core.config import looks_like_path, resolve_model
from sllmctl.core.device_load import DeviceLoad, complete, fill_from_files
from sllmctl.core.device_stream import stream_to_device
from sllmctl.core.devices import find_device
from sllmctl.core.load import Loaded, LoadOptions
from sllmctl.core.load import load as load_checkpoint
from sllmctl.core.placement import DeviceMap
from sllmctl.core.progress import ProgressFn
from sllmctl.core.stream import stream
from sllmctl.errors import CheckpointNotFound, ConfigError, StoreError
from sllmctl.store.client import StoreClient
from sllmctl.store.load import load_named, load_named_to_devices, load_through_store
from sllmctl.store.named import NamedModel
from sllmctl.store.spans import fill_through_store, store_source
from sllmctl.store.views import store_views

if TYPE_CHECKING:
    import torch

Model = str | os.PathLike[str]
StoreUse = Literal["auto", "require", "off"]
log = logging.getLogger(__name__)


def prepare_load(
    model: Model,
    device_map: object,
    storage_path: Model | None,
    store: StoreUse,
    socket: Path | None,
    label: str | None,
    options: LoadOptions | None,
) -> Callable[[ProgressFn | None], Loaded]:
    """Do what has to be done on the caller's thread; what is returned does the rest on any.

    Args and errors: as ``api.load``.
    """
    import torch  # noqa: F401 - its import takes seconds, and is no part of the load

    devices = DeviceMap.parse(device_map)  # imports torch_npu where one is an NPU
    options = options or LoadOptions.choose()
    started = time.perf_counter()
    named = None
    with ExitStack() as failed:
        client = _connect(store, socket)  # its greeting comes while the checkpoint is opened
        if client is not None:
            failed.callback(client.close)
        try:
            checkpoint = open_checkpoint(resolve_model(model, storage_path))
        except CheckpointNotFound as exc:
            named = _find_in_store(model, store, client, exc)
            checkpoint = named.checkpoint
            failed.callback(named.close)
        label = label or (model if isinstance(model, str) else str(checkpoint.path))
        opened = time.perf_counter()
        placement = devices.place(checkpoint)
        run: Callable[[ProgressFn | None], Loaded]
        if all(spec.kind == "cpu" for spec in placement.values()):
            run = partial(_load_to_host, checkpoint, options, client, store, label)
            if named is not None:
                run = partial(load_named, named, options)
        elif named is not None:
            ready = DeviceLoad(checkpoint, placement, options)
            run = partial(load_named_to_devices, named, ready, options)
        else:
            ready = DeviceLoad(checkpoint, placement, options)
            run = partial(_load_to_devices, checkpoint, ready, options, client, store, label)
        failed.pop_all()
    opened_s, planned_s = opened - started, time.perf_counter() - opened

    def finish(progress: ProgressFn | None) -> Loaded:
        loaded = run(progress)
        loaded.stats.open_s += opened_s
        loaded.stats.plan_s += planned_s
        loaded.stats.elapsed_s += opened_s + planned_s
        return loaded

    return finish


def prepare_stream(
    model: Model, device: object, storage_path: Model | None, store: StoreUse
) -> Iterator[tuple[str, torch.Tensor]]:
    """Open a checkpoint to walk through. Args and errors: as ``api.stream_tensors``."""
    spec = find_device(device)
    options = LoadOptions.choose()
    with ExitStack() as failed:
        client = _connect(store, None)
        if client is not None:
            failed.callback(client.close)
        try:
            checkpoint = open_checkpoint(resolve_model(model, storage_path))
        except CheckpointNotFound as exc:
            if spec.kind != "cpu":
                raise
            named = _find_in_store(model, store, client, exc)
            tensors = load_named(named, options).tensors
            failed.pop_all()  # their lease is the client's
            return iter(tensors.items())
        failed.pop_all()
    if client is None:
        if spec.kind == "cpu":
            return stream(checkpoint, options)
        return stream_to_device(checkpoint, spec, options)
    label = model if isinstance(model, str) else str(checkpoint.path)
    if spec.kind == "cpu":
        views = partial(store_views, client, checkpoint, label, store == "require")
        return stream(checkpoint, options, views=views)
    source = partial(store_source, client, checkpoint, label, store == "require")
    return stream_to_device(checkpoint, spec, options, source=source)


def _find_in_store(
    model: Model, store: StoreUse, client: StoreClient | None, missing: CheckpointNotFound
) -> NamedModel:
    """What a store has of a model by this name, whose weights are not here.

    Raises:
        CheckpointNotFound: None answers, or it has no such model.
        StoreError: It is required, and what answers is silent, or of another version.
    """
    if client is None or isinstance(model, os.PathLike) or looks_like_path(model):
        raise missing
    try:
        return NamedModel(client, model)
    except StoreError as exc:
        if not client.segment_bytes:  # it has not even said hello
            if store == "require":
                raise
            log.warning("no store is used: %s", exc)
            raise missing from exc
        raise CheckpointNotFound(
            f"{missing}, and the store has none: {exc}", hint=missing.hint
        ) from exc


def _load_to_host(
    checkpoint: Checkpoint,
    options: LoadOptions,
    client: StoreClient | None,
    store: StoreUse,
    label: str,
    progress: ProgressFn | None,
) -> Loaded:
    if client is not None:
        try:
            return load_through_store(checkpoint, options, client, label=label, progress=progress)
        except StoreError as exc:
            client.close()
            if store == "require":
                raise
            log.warning("the store cannot serve this load (%s); it goes to disk", exc)
    return load_checkpoint(checkpoint, options, progress=progress)


def _load_to_devices(
    checkpoint: Checkpoint,
    ready: DeviceLoad,
    options: LoadOptions,
    client: StoreClient | None,
    store: StoreUse,
    label: str,
    progress: ProgressFn | None,
) -> Loaded:
    fill = fill_from_files(checkpoint, ready, progress)
    if client is not None:
        otherwise = None if store == "require" else fill
        fill = fill_through_store(
            checkpoint, ready, client, label, otherwise=otherwise, progress=progress
        )
    return complete(checkpoint, ready, options, fill, progress)


def _connect(store: StoreUse, socket: Path | None) -> StoreClient | None:
    if store not in get_args(StoreUse):
        raise ConfigError(
            f"`{store}` is not a value of `store`", hint="; ".join(get_args(StoreUse))
        )
    if store == "off":
        return None
    try:
        return StoreClient(socket)
    except StoreError as exc:
        if store == "require":
            raise
        log.debug("no store is used: %s", exc)
        return None

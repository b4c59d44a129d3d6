"""The public functions: what `import sllmctl` offers, and what the commands call."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sllmctl.core.background import Loading
from sllmctl.core.checkpoint import Checkpoint, Format, open_checkpoint
from sllmctl.core.config import looks_like_path, resolve_model
from sllmctl.core.device_load import DeviceLoad, complete, fill_from_files
from sllmctl.core.devices import find_device
from sllmctl.core.load import Loaded, LoadOptions
from sllmctl.core.load import load as load_checkpoint
from sllmctl.core.placement import DeviceMap
from sllmctl.core.progress import ProgressFn
from sllmctl.core.write.layout import DEFAULT_SHARD_BYTES
from sllmctl.errors import CheckpointNotFound, ConfigError, StoreError, StoreUnreachable
from sllmctl.store.client import StoreClient
from sllmctl.store.load import load_named, load_named_to_devices, load_through_store
from sllmctl.store.named import NamedModel
from sllmctl.store.spans import fill_through_store, store_source
from sllmctl.store.views import store_views

if TYPE_CHECKING:
    import torch

    from sllmctl.core.write.convert import ConvertResult

Model = str | os.PathLike[str]
StoreUse = Literal["auto", "require", "off"]
log = logging.getLogger(__name__)


def load(
    model: Model,
    device: object = "cpu",
    *,
    device_map: object = None,
    storage_path: Model | None = None,
    store: StoreUse = "auto",
    socket: Path | None = None,
    label: str | None = None,
    options: LoadOptions | None = None,
    progress: ProgressFn | None = None,
) -> Loaded:
    """Load a checkpoint: its tensors by name, and what the load did.

    Args:
        model: A path, or a name below the storage path.
        device: Where to: ``npu:0``, ``cuda:1``, ``cpu``, ``npu`` for torch's current one, or
            ``auto`` for that of the first kind that works here (npu, cuda, cpu).
        device_map: Where to, instead: a device, or what spreads tensors over several, as
            ``core.placement.DeviceMap.parse`` reads it.
        storage_path: Where names are looked up; see ``core.config.storage_path``.
        store: ``auto`` uses a store that answers, ``require`` no other way, ``off`` none.
        socket: The store's, instead of the usual ones.
        label: How the store shows the model; as ``model`` says when not given.
        options: How to load; from the environment when not given.
        progress: Called with stage ``read``.

    A name whose weights are not here is asked of the store, which may see them, or have it warm.

    Raises:
        CheckpointNotFound, CheckpointError: No checkpoint is there, or it is damaged.
        DeviceUnavailable: A device is not there, or torch has no backend for it.
        DeviceError: A device has no room, which is told before anything is read, or it failed.
        StoreUnreachable: A store is required, and none answers.
        SllmError: As ``core.load.load`` raises them.
    """
    return _prepare(
        model,
        device if device_map is None else device_map,
        storage_path,
        store,
        socket,
        label,
        options,
    )(progress)


def start_load(
    model: Model,
    device: object = "cpu",
    *,
    device_map: object = None,
    storage_path: Model | None = None,
    store: StoreUse = "auto",
    socket: Path | None = None,
    label: str | None = None,
    options: LoadOptions | None = None,
    progress: ProgressFn | None = None,
) -> Loading:
    """Start a load that goes on in the background, and return at once.

    Call it on the thread that will use the tensors: memory on devices is allocated here, and what
    contradicts itself or has no room is raised here. All else is raised by ``wait``:

        with start_load("Qwen/Qwen3-8B", "npu:0") as loading:
            skeleton = ...  # whatever takes its time
            tensors = loading.wait().tensors

    Args and errors: as `load`; ``progress`` is called by the background's thread.
    """
    return Loading(
        _prepare(
            model,
            device if device_map is None else device_map,
            storage_path,
            store,
            socket,
            label,
            options,
        ),
        progress,
    )


def _prepare(
    model: Model,
    device_map: object,
    storage_path: Model | None,
    store: StoreUse,
    socket: Path | None,
    label: str | None,
    options: LoadOptions | None,
) -> Callable[[ProgressFn | None], Loaded]:
    """Do what has to be done on the caller's thread; what is returned does the rest on any."""
    import torch  # noqa: F401 - its import takes seconds, and is no part of the load

    devices = DeviceMap.parse(device_map)  # imports torch_npu where one is an NPU
    options = options or LoadOptions.choose()
    started = time.perf_counter()
    named = None
    try:
        checkpoint = open_checkpoint(resolve_model(model, storage_path))
        client = _connect(store, socket)
    except CheckpointNotFound as exc:
        named = _find_in_store(model, store, socket, exc)
        checkpoint, client = named.checkpoint, named.client
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
    opened_s, planned_s = opened - started, time.perf_counter() - opened

    def finish(progress: ProgressFn | None) -> Loaded:
        loaded = run(progress)
        loaded.stats.open_s += opened_s
        loaded.stats.plan_s += planned_s
        loaded.stats.elapsed_s += opened_s + planned_s
        return loaded

    return finish


def _find_in_store(
    model: Model, store: StoreUse, socket: Path | None, missing: CheckpointNotFound
) -> NamedModel:
    """What a store has of a model by this name, whose weights are not here.

    Raises:
        CheckpointNotFound: None answers, or it has no such model.
    """
    if isinstance(model, os.PathLike) or looks_like_path(model):
        raise missing
    client = _connect(store, socket)
    if client is None:
        raise missing
    try:
        return NamedModel(client, model)
    except StoreError as exc:
        client.close()
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
    return complete(checkpoint, ready, options, fill)


def _connect(store: StoreUse, socket: Path | None) -> StoreClient | None:
    if store == "off":
        return None
    try:
        return StoreClient(socket)
    except StoreError as exc:
        if store == "require":
            raise
        level = logging.DEBUG if isinstance(exc, StoreUnreachable) else logging.WARNING
        log.log(level, "no store is used: %s", exc)
        return None


def load_tensors(
    model: Model,
    device: object = "cpu",
    *,
    device_map: object = None,
    storage_path: Model | None = None,
    store: StoreUse = "auto",
    verify: bool = False,
) -> dict[str, torch.Tensor]:
    """Load every tensor of a checkpoint, by name.

    Tensors are writable, and no write reaches the file. Each keeps the memory alive that it looks
    into; nothing has to be closed. In host memory each has a storage of its own; on a device many
    share one of at most 1 GiB.

    Args:
        model: A path, or a name below the storage path.
        device, device_map: Where to, as `load` takes them.
        storage_path: Where names are looked up.
        store: ``auto`` uses a store that answers, ``require`` no other way, ``off`` none.
        verify: Compare every byte with the digests that `convert` took.

    Raises:
        SllmError: As `load` raises them.
    """
    options = LoadOptions.choose(verify=verify)
    return load(
        model,
        device,
        device_map=device_map,
        storage_path=storage_path,
        store=store,
        options=options,
    ).tensors


def stream_tensors(
    model: Model,
    device: object = "cpu",
    *,
    storage_path: Model | None = None,
    store: StoreUse = "auto",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` in file order, with about 512 MiB on the device at a time.

    What a tensor looks into is freed when the last tensor of its 256 MiB window is. In host
    memory, what a store has is looked at where it is, and takes none.

    Args and errors: as `load_tensors`; what goes wrong on the way is raised on the way. A model
    whose weights are not here comes from a store to host memory alone.
    """
    from sllmctl.core.device_stream import stream_to_device
    from sllmctl.core.stream import stream

    spec = find_device(device)
    options = LoadOptions.choose()
    try:
        checkpoint = open_checkpoint(resolve_model(model, storage_path))
        client = _connect(store, None)
    except CheckpointNotFound as exc:
        if spec.kind != "cpu":
            raise
        named = _find_in_store(model, store, None, exc)
        return iter(load_named(named, options).tensors.items())
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


def run_conversion(
    source: Model,
    output: Model | None = None,
    *,
    storage_path: Model | None = None,
    hub: str = "auto",
    revision: str | None = None,
    dtype: str = "keep",
    format: Format = "safetensors",  # noqa: A002
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = False,
    verify: bool = True,
    progress: ProgressFn | None = None,
) -> ConvertResult:
    """Download if need be, convert, verify; and say what was done.

    Args:
        source: A name on a hub, such as ``Qwen/Qwen3-8B``, or a local directory or file.
        output: Where to; by default the model's name below the storage path.
        storage_path: See ``core.config.storage_path``.
        hub: ``auto``, ``huggingface`` or ``modelscope``.
        revision: Branch, tag or commit on the hub.
        dtype: ``keep``, ``bfloat16``, ``float16`` or ``float32``.
        format: ``safetensors``, or ``sllm-store`` for those who run its server.
        max_shard_bytes: A shard is no larger, unless a single tensor is.
        include: Patterns of relative file names; only files that match take part.
        exclude: Patterns of relative file names that take no part.
        force: Replace a checkpoint that is there.
        verify: Read what was written back from the disk.
        progress: Called with stages ``download``, ``convert`` and ``verify``.

    Raises:
        HubError: The hub refused, failed or cannot be reached.
        SllmError: As ``core.convert.convert`` raises them.
    """
    from sllmctl.core.hub.fetch import fetch
    from sllmctl.core.manifest import Origin
    from sllmctl.core.places import find_source
    from sllmctl.core.write.convert import convert as convert_directory
    from sllmctl.core.write.sllm_store_ranks import convert_ranks, is_rank_save

    place = find_source(source)
    target = place.target(output, storage_path)
    path, origin, files = place.path, place.origin, None
    if path is None:
        download = fetch(
            place.name,
            hub=hub,
            revision=revision,
            include=include,
            exclude=exclude,
            progress=progress,
        )
        path, files = download.path, download.files
        origin = Origin(hub=download.hub, name=download.name, revision=download.revision)
    elif revision is not None:
        raise ConfigError(
            f"`{source}` is a local path, and has no revision `{revision}`",
            hint="leave out the revision, or give a model's name on a hub",
        )
    run = convert_ranks if is_rank_save(path) else convert_directory
    return run(
        path,
        target,
        dtype=dtype,
        file_format=format,
        max_shard_bytes=max_shard_bytes,
        include=include,
        exclude=exclude,
        files=files,
        force=force,
        verify=verify,
        origin=origin,
        progress=progress,
    )


def convert(
    source: Model,
    output: Model | None = None,
    *,
    storage_path: Model | None = None,
    hub: str = "auto",
    revision: str | None = None,
    dtype: str = "keep",
    format: Format = "safetensors",  # noqa: A002
    force: bool = False,
) -> Path:
    """Download a model if need be, convert it, and verify what was written.

    Nothing is done where the same conversion is there already. Args and errors: as
    `run_conversion`.

    Returns:
        The checkpoint's directory.
    """
    return run_conversion(
        source,
        output,
        storage_path=storage_path,
        hub=hub,
        revision=revision,
        dtype=dtype,
        format=format,
        force=force,
    ).path


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: Model,
    *,
    files: Mapping[str, bytes] | None = None,
    force: bool = True,
) -> Path:
    """Write tensors as a checkpoint, in one step: the old one or the new one is there, no half.

    Args:
        tensors: By name, of any device, strides and size. Exactly tied ones are stored once.
        path: Directory to make.
        files: Files beside the weights, such as ``config.json``, by relative name.
        force: Replace a checkpoint that is there.

    Raises:
        SllmError: As ``core.save.save_tensors`` raises them.
    """
    from sllmctl.core.write.save import save_tensors as save

    return save(tensors, Path(path), files=files, force=force).path

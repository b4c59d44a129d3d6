"""The public functions: what `import sllmctl` offers, and what the commands call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sllmctl.core.background import Loading
from sllmctl.core.checkpoint import Format
from sllmctl.core.load import Loaded, LoadOptions
from sllmctl.core.progress import ProgressFn
from sllmctl.core.write.layout import DEFAULT_SHARD_BYTES
from sllmctl.errors import ConfigError
from sllmctl.store.choice import Model as Model
from sllmctl.store.choice import StoreUse as StoreUse
from sllmctl.store.choice import prepare_load, prepare_stream

if TYPE_CHECKING:
    import torch

    from sllmctl.core.write.convert import ConvertResult


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
        progress: Called with stage ``read``, and on devices with ``verify`` where that is asked.

    A name whose weights are not here is asked of the store, which may see them, or have it warm.

    Raises:
        CheckpointNotFound, CheckpointError: No checkpoint is there, or it is damaged.
        DeviceUnavailable: A device is not there, or torch has no backend for it.
        DeviceError: A device has no room, which is told before anything is read, or it failed.
        StoreUnreachable: A store is required, and none answers.
        SllmError: As ``core.load.load`` raises them.
    """
    return prepare_load(
        model,
        _where(device, device_map),
        storage_path,
        store,
        socket,
        label,
        options,
    )(progress)


def _where(device: object, device_map: object) -> object:
    if device_map is not None and str(device) != "cpu":
        raise ConfigError(
            f"both device `{device}` and a device_map say where to load",
            hint='give one of them; "" in a map stands for everything that no other entry names',
        )
    return device if device_map is None else device_map


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
        prepare_load(
            model,
            _where(device, device_map),
            storage_path,
            store,
            socket,
            label,
            options,
        ),
        progress,
    )


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
    into; nothing has to be closed. Loaded to host memory alone, each has a storage of its own; in a
    load to devices many share one of at most 1 GiB, also those that go to the cpu.

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
    return prepare_stream(model, device, storage_path, store)


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

    return save(tensors, Path(path).expanduser(), files=files, force=force).path

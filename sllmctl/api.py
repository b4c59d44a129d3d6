"""The public functions: what `import sllmctl` offers, and what the commands call."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.config import resolve_model
from sllmctl.core.devices import require_cpu
from sllmctl.core.load import Loaded, LoadOptions
from sllmctl.core.load import load as load_checkpoint
from sllmctl.core.progress import ProgressFn

if TYPE_CHECKING:
    import torch

Model = str | os.PathLike[str]


def load(
    model: Model,
    device: object = "cpu",
    *,
    storage_path: Model | None = None,
    options: LoadOptions | None = None,
    progress: ProgressFn | None = None,
) -> Loaded:
    """Load a checkpoint: its tensors by name, and what the load did.

    Args:
        model: A path, or a name below the storage path.
        device: Where to; ``cpu``.
        storage_path: Where names are looked up; see ``core.config.storage_path``.
        options: How to load; from the environment when not given.
        progress: Called with stage ``read``.

    Raises:
        CheckpointNotFound, CheckpointError: No checkpoint is there, or it is damaged.
        SllmError: As ``core.load.load`` raises them.
    """
    import torch  # noqa: F401 - its import takes seconds, and is no part of the load

    require_cpu(device)
    started = time.perf_counter()
    checkpoint = open_checkpoint(resolve_model(model, storage_path))
    opened_s = time.perf_counter() - started
    loaded = load_checkpoint(checkpoint, options or LoadOptions.choose(), progress=progress)
    loaded.stats.open_s += opened_s
    loaded.stats.elapsed_s += opened_s
    return loaded


def load_tensors(
    model: Model,
    device: object = "cpu",
    *,
    storage_path: Model | None = None,
    verify: bool = False,
) -> dict[str, torch.Tensor]:
    """Load every tensor of a checkpoint, by name.

    Tensors are writable, and no write reaches the file. Each has a storage of its own and keeps
    the memory alive that it looks into; nothing has to be closed.

    Args:
        model: A path, or a name below the storage path.
        device: Where to; ``cpu``.
        storage_path: Where names are looked up.
        verify: Compare every byte with the digests that `convert` took.

    Raises:
        SllmError: As `load` raises them.
    """
    options = LoadOptions.choose(verify=verify)
    return load(model, device, storage_path=storage_path, options=options).tensors


def stream_tensors(
    model: Model, device: object = "cpu", *, storage_path: Model | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` in file order, with about 512 MiB in memory at a time.

    Args and errors: as `load_tensors`. What a tensor looks into is freed when the last tensor
    of its 256 MiB window is.
    """
    from sllmctl.core.stream import stream

    require_cpu(device)
    checkpoint = open_checkpoint(resolve_model(model, storage_path))
    return stream(checkpoint, LoadOptions.choose())

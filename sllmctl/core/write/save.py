"""Write tensors that are in memory as a checkpoint."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sllmctl.core.checkpoint import INDEX_SUFFIX, STATE_NAME, SUFFIX
from sllmctl.core.header import is_unicode
from sllmctl.core.manifest import MANIFEST_NAME, Origin
from sllmctl.core.progress import ProgressFn
from sllmctl.core.write.assemble import Recipe, assemble
from sllmctl.core.write.convert import ConvertResult
from sllmctl.core.write.layout import DEFAULT_SHARD_BYTES
from sllmctl.core.write.target import require_replaceable
from sllmctl.core.write.tensor_bytes import collect_tensors
from sllmctl.errors import ConfigError

if TYPE_CHECKING:
    import torch


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    target: Path,
    *,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = True,
    verify: bool = False,
    progress: ProgressFn | None = None,
) -> ConvertResult:
    """Write tensors as a checkpoint, in one step: the old one or the new one is there, no half.

    Args:
        tensors: By name, of any device, strides and size. Exactly tied ones are stored once.
        target: Directory to make.
        files: Files beside the weights, such as ``config.json``, by relative name.
        max_shard_bytes: A shard is no larger, unless a single tensor is.
        force: Replace a checkpoint that is there.
        verify: Read the shards back from the disk and compare the digests.
        progress: Called with stages ``convert`` and ``verify``.

    Raises:
        CheckpointError: Safetensors cannot store a value, or the target cannot be written.
        ChecksumMismatch: What was written does not read back.
        ConfigError: The target may not be replaced, its disk is too small, or a file's name leads
            out of it.
    """
    started = time.perf_counter()
    files = files or {}
    for name in files:
        path = PurePosixPath(name)
        if not is_unicode(name) or "\0" in name:
            raise ConfigError(f"the file name {name!a} is not valid Unicode, or holds a NUL")
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ConfigError(f"the file name `{name}` leads out of the checkpoint")
        if name in (MANIFEST_NAME, STATE_NAME) or (
            "/" not in name and name.endswith((SUFFIX, INDEX_SUFFIX))
        ):
            raise ConfigError(f"the file name `{name}` is one that the checkpoint itself uses")
    require_replaceable(target, force=force)
    recipe = Recipe(
        target=target,
        # Nothing identifies what is in memory: a killed save is not taken up.
        fingerprint=uuid.uuid4().hex,
        origin=Origin(),
        dtype="keep",
        max_shard_bytes=max_shard_bytes,
        force=force,
        verify=verify,
    )
    made = assemble(recipe, collect_tensors(tensors), files=files, progress=progress)
    return ConvertResult(
        source="memory",
        path=target,
        tensors=made.manifest.tensors,
        bytes=made.manifest.bytes,
        shards=len(made.manifest.shards),
        elapsed_s=time.perf_counter() - started,
        write_s=made.write_s,
        verify_s=made.verify_s,
    )

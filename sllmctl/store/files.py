"""A model's files, open: what a fill reads, and what makes the model this one and no other."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.config import is_there
from sllmctl.errors import CheckpointNotFound, SllmError, StoreError
from sllmctl.store.protocol import MAX_SHARDS, close_fds
from sllmctl.store.residency import Identity


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Open shards, in order; whoever has them closes them.

    Attributes:
        name: The model's, or a client's label.
        named: It is the name of these files below the storage path.
        shards: Name and size in bytes of each.
        fds: Their descriptors.
        identity: What they are; see `identify`.
    """

    name: str
    named: bool
    shards: tuple[tuple[str, int], ...]
    fds: Sequence[int]
    identity: Identity

    def close(self) -> None:
        """Close the descriptors."""
        close_fds(self.fds)


def identify(fds: Sequence[int]) -> Identity:
    """What makes these files these and no others."""
    stamps = [os.fstat(fd) for fd in fds]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stamps)


def take_files(storage: Path, label: str, names: Sequence[str], fds: Sequence[int]) -> ModelFiles:
    """Look at files that a client has opened. May wait for their disk; takes the descriptors.

    Raises:
        StoreError: One is not a regular file, or cannot be looked at.
    """
    files = _look_at(label, names, fds)
    return replace(files, named=_is_named(storage, label, names, files.identity))


def open_named(storage: Path, name: str) -> ModelFiles:
    """Open the shards of a model below the storage path. May wait for its disk.

    Raises:
        CheckpointNotFound: There is no such model, or its weights are gone.
        CheckpointError: It is damaged.
        StoreError: The name leads out of the storage path, or a file cannot be opened.
    """
    root, path = _beneath(storage, name)
    if not is_there(path):
        raise CheckpointNotFound(
            f"there is no checkpoint `{name}` in the store's `{storage}`",
            hint=f"`sllmctl ls --storage-path {shlex.quote(str(storage))}` lists what is there",
        )
    checkpoint = open_checkpoint(path)
    names, fds = [], []
    try:
        if len(checkpoint.shards) > MAX_SHARDS:
            raise StoreError(f"`{name}` has more than {MAX_SHARDS} shards")
        for shard in checkpoint.shards:
            real = Path(os.path.realpath(shard.path))
            if root not in real.parents:
                raise StoreError(f"`{shard.path}` leads out of `{storage}`")
            fds.append(os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
            names.append(shard.path.name)
    except OSError as exc:
        close_fds(fds)
        raise StoreError(f"cannot open `{exc.filename}`: {exc.strerror}") from exc
    except BaseException:
        close_fds(fds)
        raise
    return replace(_look_at(name, names, fds), named=True)


def _look_at(name: str, names: Sequence[str], fds: Sequence[int]) -> ModelFiles:
    try:
        for shard, fd in zip(names, fds, strict=True):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StoreError(f"`{shard}` is not a regular file")
        identity = identify(fds)
    except OSError as exc:
        close_fds(fds)
        raise StoreError(f"cannot look at the files of `{name}`: {exc.strerror}") from exc
    except BaseException:
        close_fds(fds)
        raise
    sizes = (size for _, _, size, _, _ in identity)
    return ModelFiles(name, False, tuple(zip(names, sizes, strict=True)), fds, identity)


def _is_named(storage: Path, label: str, names: Sequence[str], identity: Identity) -> bool:
    """Whether a label is the name below the storage path of these very files, and no others."""
    try:
        root, path = _beneath(storage, label)
        shards = open_checkpoint(path).shards
        if [shard.path.name for shard in shards] != list(names):
            return False
        for shard, (device, inode, *_) in zip(shards, identity, strict=True):
            real = Path(os.path.realpath(shard.path))
            found = real.stat()
            if root not in real.parents or (found.st_dev, found.st_ino) != (device, inode):
                return False
    except (OSError, ValueError, SllmError):
        return False
    return True


def _beneath(storage: Path, name: str) -> tuple[Path, Path]:
    root = Path(os.path.realpath(storage))
    path = Path(os.path.realpath(root / name)) if "\0" not in name else root
    if ".." in Path(name).parts or Path(name).is_absolute() or root not in path.parents:
        raise StoreError(f"`{name}` is not the name of a model below `{storage}`")
    return root, path

"""Weights in torch's own files: `.bin`, `.pt`, `.pth`. No code in them is ever run."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllmctl.core.fileio import SourceFile
from sllmctl.core.header import LFS_HINT, LFS_START, shown
from sllmctl.core.write.layout import TensorSpec
from sllmctl.core.write.sources import Listing, Weights
from sllmctl.core.write.tensor_bytes import collect_tensors
from sllmctl.core.write.writer import ByteSource
from sllmctl.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_WRAPPER = "state_dict"


def open_torch_files(listing: Listing) -> Weights:
    """Open the weights of a source in torch's format.

    A file of torch 1.6 or later is mapped, not loaded: its tensors are read from their place in it.
    An older one is loaded into memory whole.

    Raises:
        CheckpointError: A file is damaged, holds something else than tensors, or would need code
            to be run; or two files have a tensor of one name.
        ReadError: A file cannot be opened.
    """
    specs: list[TensorSpec] = []
    aliases: dict[str, str] = {}
    sources: dict[str, tuple[ByteSource, int]] = {}
    opened: list[SourceFile] = []
    found_in: dict[str, str] = {}

    def close() -> None:
        for source in opened:
            source.close()

    try:
        for file in listing.weights:
            source = SourceFile(file.path)
            opened.append(source)
            weights = _open_file(source)
            for name in (*weights.sources, *weights.aliases):
                if name in found_in:
                    raise CheckpointError(
                        f"tensor {shown(name)} is in two files of `{listing.path}`: "
                        f"{shown(found_in[name])} and {shown(file.name)}"
                    )
                found_in[name] = file.name
            specs += weights.tensors
            aliases |= weights.aliases
            sources |= weights.sources
    except BaseException:
        close()
        raise
    return Weights(specs, aliases, {}, sources, close)


def _open_file(source: SourceFile) -> Weights:
    import torch

    mapped = zipfile.is_zipfile(source.path)
    if mapped:
        _check_byte_order(source.path)
    try:
        with warnings.catch_warnings():
            # torch remarks on old protocols and types; what it cannot read is an error anyway.
            warnings.simplefilter("ignore")
            loaded: Any = torch.load(
                source.path, map_location="cpu", weights_only=True, mmap=mapped
            )
    except Exception as exc:  # whatever a damaged file does to torch's parsers
        if isinstance(exc, pickle.UnpicklingError) and "GLOBAL" in str(exc):
            raise CheckpointError(
                f"`{source.path}` holds more than tensors: reading it would run code of its own",
                hint="use a version of the model in safetensors, or save only its state_dict",
            ) from exc
        with source.path.open("rb") as file:
            start = file.read(len(LFS_START))
        if start == LFS_START:
            raise CheckpointError(
                f"`{source.path}` is a pointer to a file, not the file", hint=LFS_HINT
            ) from exc
        reason = str(exc).strip().partition("\n")[0].partition(". ")[0] or type(exc).__name__
        raise CheckpointError(f"`{source.path}` is not a readable torch file: {reason}") from exc
    tensors = _state_dict(loaded, source.path)
    try:
        return collect_tensors(tensors, _locate(tensors, source) if mapped else None)
    except CheckpointError as exc:
        raise CheckpointError(f"`{source.path}`: {exc}", hint=exc.hint) from exc


def _state_dict(loaded: Any, path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors by name, taken out of the ``state_dict`` that a training checkpoint has."""
    if isinstance(loaded, Mapping) and isinstance(loaded.get(_WRAPPER), Mapping):
        loaded = loaded[_WRAPPER]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"`{path}` holds a {type(loaded).__name__}, not tensors by name",
            hint="save only the model's state_dict",
        )
    return loaded


def _check_byte_order(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/byteorder") and archive.read(name).strip() != b"little":
                raise CheckpointError(f"`{path}` was saved on a big-endian machine")


def _locate(
    tensors: Mapping[str, torch.Tensor], source: SourceFile
) -> dict[int, tuple[ByteSource, int]]:
    """Find where in the file each storage lies: the mappings of this process say so.

    Read from there, a tensor's bytes never become part of this process's memory.

    Source: proc(5), ``/proc/pid/maps``.
    """
    import torch

    status = source.path.stat()
    identity = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino)
    # On overlayfs and btrfs the numbers differ from those of stat; the name is the same.
    name = os.path.realpath(source.path)
    mappings: list[tuple[int, int, int]] = []
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            addresses, _, at, *file = line.split(maxsplit=5)
            if tuple(file[:2]) == identity or file[2:] == [name]:
                first, last = (int(text, 16) for text in addresses.split("-"))
                mappings.append((first, last, int(at, 16)))
    places: dict[int, tuple[ByteSource, int]] = {}
    for tensor in tensors.values():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            continue
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        for start, end, offset in mappings:
            if start <= address and address + storage.nbytes() <= end:
                places[address] = source, offset + address - start
    return places

"""What a conversion reads: the files that are weights, and those that go along as they are."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from sllmctl.core.checkpoint import (
    INDEX_SUFFIX,
    SUFFIX,
    find_shards,
    holds_sllm_store,
    natural_key,
    open_shards,
    require_all_parts,
    require_finished,
)
from sllmctl.core.fileio import SourceFile, errno_text, read_file
from sllmctl.core.header import is_unicode, parse_index, shown
from sllmctl.core.manifest import MANIFEST_NAME
from sllmctl.core.sllm_store import INDEX_NAME as SLLM_INDEX_NAME
from sllmctl.core.sllm_store import MODULES_NAME, TIED_NAME, is_data_name
from sllmctl.core.write.layout import TensorSpec
from sllmctl.core.write.writer import ByteSource
from sllmctl.errors import CheckpointError, CheckpointNotFound

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
RANK_STATES = "rank_state/"
"""What engines derive from a checkpoint, and put beside it; another checkpoint has its own."""

OTHER_FORMATS = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot"),
    *("*.onnx", "*.onnx_data", "*.gguf", "*.bin.index.json", "*.h5.index.json"),
    *("*.msgpack.index.json", "original/*", "onnx/*"),
    *("tensor.data_*", SLLM_INDEX_NAME, MODULES_NAME, TIED_NAME),
)
"""Weights in other formats, which stay behind unless ``--include`` names them."""

SKIPPED_DIRECTORIES = frozenset({".git", ".cache", "__pycache__"})
_TRAINING_STATE = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*")


class FoundFile(NamedTuple):
    """A regular file of the source: its relative name, where it is, and its identity now.

    ``outside`` marks a link that leads out of the source.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int
    outside: bool


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a source, by what becomes of them.

    Attributes:
        path: The directory.
        kind: ``safetensors``, ``sllm-store`` or ``torch``: the format of the weights.
        weights: The weights' files, in natural order of their names.
        index: The weights' index, if they have one.
        others: What is copied byte for byte.
        warnings: What is left out against expectation.
    """

    path: Path
    kind: str
    weights: tuple[FoundFile, ...]
    index: FoundFile | None
    others: tuple[FoundFile, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors to be written, and where their bytes are.

    Attributes:
        tensors: In any order.
        aliases: Tied name to the name of the tensor that is stored.
        metadata: Text metadata to carry over.
        sources: For each tensor, the source of its bytes and the offset of the first.
        close: Ends the sources.
        warnings: What a person should know.
    """

    tensors: list[TensorSpec]
    aliases: dict[str, str]
    metadata: dict[str, str]
    sources: dict[str, tuple[ByteSource, int]]
    close: Callable[[], None]
    warnings: tuple[str, ...] = ()


def list_source(
    path: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    files: Sequence[str] | None = None,
) -> Listing:
    """List the files of a source directory, or of a single weights file.

    Args:
        path: The directory or the file.
        include: Patterns; if there are any, a file takes part only if one matches its relative
            name. A match also brings in what would stay behind as another weight format.
        exclude: Patterns; a file that one matches takes no part.
        files: Relative names; others take no part.

    Raises:
        CheckpointNotFound: No such path, or no weights in it.
        CheckpointError: The weights' index is damaged, or a file that it names, or that the other
            files' names count, is not there.
    """
    if path.is_file():
        path, files = path.parent, (path.name,)
    elif not path.is_dir():
        raise CheckpointNotFound(f"there is no directory `{path}`")
    wanted = None if files is None else set(files)

    def takes_part(name: str) -> bool:
        return (
            (wanted is None or name in wanted)
            and (not include or _matches(name, include))
            and not _matches(name, exclude)
        )

    skipped: dict[str, str] = {}
    found = {file.name: file for file in _walk(path, skipped) if takes_part(file.name)}
    skipped = {name: why for name, why in skipped.items() if takes_part(name)}
    require_finished(path, found)
    top = [name for name in (*found, *skipped) if "/" not in name]
    try:
        kind, index_name, names = _find_weights(path, top)
    except CheckpointNotFound as exc:
        hint = "--include and --exclude may leave them out" if include or exclude else exc.hint
        raise CheckpointNotFound(str(exc), hint=hint) from exc

    def take(name: str) -> FoundFile:
        if name not in found:
            what = f"`{path / str(index_name)}` names {shown(name)}, which is not there"
            if name in skipped:
                what = f"{shown(path / name)} {skipped[name]}"
            raise CheckpointError(what, hint="the download or copy is incomplete")
        return found[name]

    index = None if index_name is None else take(index_name)
    if index is not None and kind != "sllm-store":
        names = sorted(
            set(parse_index(read_file(index.path), str(index.path)).values()), key=natural_key
        )
    elif not (files or include or exclude):
        require_all_parts(path, names)
    weights = tuple(map(take, names))
    chosen = set(names)
    warnings = [f"{shown(name)} {why} and is not copied" for name, why in skipped.items()]
    others = []
    for name, file in found.items():
        if name in chosen or name == MANIFEST_NAME or name.startswith(RANK_STATES):
            continue
        if name in top and name.endswith(INDEX_SUFFIX):
            continue
        if name in top and name.endswith(SUFFIX):
            warnings.append(f"`{name}` is not part of the checkpoint and is not copied")
        elif _matches(name, OTHER_FORMATS) and not (include and _matches(name, include)):
            continue
        elif file.outside:
            # Weights are parsed, so a link may take them from anywhere. This would be copied as
            # it is, and a link in a downloaded repository must not pick up a file from elsewhere.
            warnings.append(f"`{name}` links out of the source and is not copied")
        else:
            others.append(file)
    others.sort(key=lambda file: file.name)
    return Listing(path, kind, weights, index, tuple(others), tuple(warnings))


def _find_weights(path: Path, names: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """Choose among the names in a directory: the format, its index, the weights' files."""
    if holds_sllm_store(names):
        return "sllm-store", SLLM_INDEX_NAME, sorted(filter(is_data_name, names), key=natural_key)
    try:
        return "safetensors", *find_shards(path, names)
    except CheckpointNotFound:
        return "torch", *_find_torch_files(path, names)


def has_weights(path: Path) -> bool:
    """Whether a directory itself holds weights in any format."""
    try:
        _find_weights(path, [entry.name for entry in path.iterdir()])
    except CheckpointNotFound:
        return False
    return True


def list_beside(
    path: Path, *, without: Collection[str], include: Sequence[str], exclude: Sequence[str]
) -> list[FoundFile]:
    """List what is copied byte for byte from a directory that itself has no weights.

    Args:
        path: The directory.
        without: Names of its subdirectories that take no part.
        include, exclude: As `list_source` takes them.
    """
    return [
        file
        for file in _walk(path, {})
        if file.name.partition("/")[0] not in without
        and (not include or _matches(file.name, include))
        and not _matches(file.name, (*exclude, *OTHER_FORMATS))
        and not file.outside
    ]


def open_safetensors(listing: Listing) -> Weights:
    """Open the weights of a safetensors source.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete.
        ReadError: A file cannot be opened.
    """
    index = listing.index
    weight_map = None if index is None else parse_index(read_file(index.path), str(index.path))
    checkpoint = open_shards(
        listing.path,
        [file.name for file in listing.weights],
        None if index is None or weight_map is None else (index.name, weight_map),
    )
    sources: list[SourceFile] = []

    def close() -> None:
        for source in sources:
            source.close()

    try:
        for shard in checkpoint.shards:
            sources.append(SourceFile(shard.path))
    except BaseException:
        close()
        raise
    entries = checkpoint.tensors.values()
    return Weights(
        tensors=[TensorSpec(e.name, e.dtype, e.shape, e.nbytes) for e in entries],
        aliases=checkpoint.aliases,
        metadata=checkpoint.metadata,
        sources={e.name: (sources[e.shard], e.offset) for e in entries},
        close=close,
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Match a relative name, or its last part, as the hubs' clients do."""
    last = name.rsplit("/", 1)[-1]
    return any(fnmatchcase(name, p) or fnmatchcase(last, p) for p in patterns)


def _walk(root: Path, skipped: dict[str, str]) -> Iterator[FoundFile]:
    """Yield the regular files below a directory, links to files resolved.

    ``skipped`` receives why anything else is not among them, by relative name.
    """

    def unreadable(exc: OSError) -> None:
        if Path(exc.filename) == root:
            raise CheckpointError(f"cannot read `{root}`: {errno_text(exc)}") from exc
        skipped[os.path.relpath(exc.filename, root)] = f"cannot be read ({errno_text(exc)})"

    allowed = _link_roots(root)
    for directory, subdirectories, names in os.walk(root, onerror=unreadable):
        here = Path(directory)
        for name in list(subdirectories):
            if name in SKIPPED_DIRECTORIES:
                subdirectories.remove(name)
            elif (here / name).is_symlink():
                skipped[(here / name).relative_to(root).as_posix()] = "is a link to a directory"
        for name in names:
            path = here / name
            relative_name = path.relative_to(root).as_posix()
            if name.endswith(".lock"):
                continue
            if not is_unicode(relative_name):
                skipped[relative_name] = "has a name that is not UTF-8"
                continue
            try:
                status = path.stat()
            except OSError:
                skipped[relative_name] = "is a broken link"
                continue
            if not stat.S_ISREG(status.st_mode):
                skipped[relative_name] = "is not a regular file"
                continue
            outside = path.is_symlink() and not any(
                Path(os.path.realpath(path)).is_relative_to(root) for root in allowed
            )
            yield FoundFile(relative_name, path, status.st_size, status.st_mtime_ns, outside)


def _link_roots(root: Path) -> list[Path]:
    real = Path(os.path.realpath(root))
    # Hugging Face's cache: models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]


def _find_torch_files(path: Path, names: Sequence[str]) -> tuple[str | None, list[str]]:
    indexes = [name for name in names if name.endswith(".bin.index.json")]
    if "pytorch_model.bin" in names:
        return None, ["pytorch_model.bin"]
    if len(indexes) == 1:
        return indexes[0], []
    files = sorted((n for n in names if n.endswith(TORCH_SUFFIXES)), key=natural_key)
    files = [n for n in files if not _matches(n, _TRAINING_STATE)]
    named = [n for n in files if n.startswith("pytorch_model")]
    if not files:
        raise CheckpointNotFound(
            f"no weights in `{path}`: looked for *.safetensors, *.bin, *.pt and *.pth",
            hint="give the directory that holds the weights themselves",
        )
    return None, named or files


def source_stamps(listing: Listing, *, with_times: bool) -> Mapping[str, list[int]]:
    """Identify what a conversion reads: size, and time of change, of each file by name."""
    files = [*listing.weights, *listing.others, *([listing.index] if listing.index else [])]
    return {
        file.name: [file.size, file.mtime_ns] if with_times else [file.size]
        for file in sorted(files, key=lambda file: file.name)
    }

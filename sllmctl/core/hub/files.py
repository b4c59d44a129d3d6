"""Which of a repository's files a checkpoint needs. Pure: names and sizes in, names out."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from sllmctl.errors import HubError

_PICKLED = (".bin", ".pt", ".pth")
_FOREIGN = (
    ".ckpt",
    ".ggml",
    ".gguf",
    ".h5",
    ".keras",
    ".mlmodel",
    ".msgpack",
    ".nemo",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pb",
    ".pdparams",
    ".tflite",
)
# Copies of the model for other runtimes, and what a trainer leaves behind.
_FOREIGN_FOLDER = re.compile(
    r"original|onnx|openvino|coreml|metal|runs|\.git|checkpoint-\d+|global_step\d+"
)
_TRAINING_STATE = re.compile(
    r"(training_args\.bin|(optimizer|scheduler|scaler)\.(bin|pt)|rng_state.*\.pth)"
)


def choose_files(
    names: Iterable[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    read_index: Callable[[str], bytes],
) -> list[str]:
    """Choose the files to fetch: one set of weights, and every file that is no weights.

    Safetensors go before pickled weights, what an index names before what merely lies beside
    it (``consolidated.safetensors`` beside ``model-*.safetensors``), and formats of other
    runtimes are left out.

    Args:
        names: The repository's files, with ``/`` between folders.
        include: Glob patterns of whole names, ``*`` also matching ``/``; empty takes all.
        exclude: Glob patterns of names to leave out, weights and extra files alike.
        read_index: Returns the content of one of the files.

    Returns:
        Names in sorted order.

    Raises:
        HubError: A name would lead out of the folder that it is written to.
    """
    kept = []
    for name in sorted(set(names)):
        _check_safe(name)
        if include and not any(fnmatchcase(name, pattern) for pattern in include):
            continue
        if any(fnmatchcase(name, pattern) for pattern in exclude) or _is_foreign(name):
            continue
        kept.append(name)
    safetensors = {name for name in kept if name.endswith(".safetensors")}
    pickled = {name for name in kept if name.endswith(_PICKLED)}
    if _depth(safetensors) <= _depth(pickled):
        dropped = pickled | _superseded(kept, safetensors, (".safetensors",), "model", read_index)
        stale = ".bin.index.json"
    else:
        dropped = _superseded(kept, pickled, _PICKLED, "pytorch_model", read_index)
        stale = ".safetensors.index.json"
    return [name for name in kept if name not in dropped and not name.endswith(stale)]


def _check_safe(name: str) -> None:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\0-\x1f]", name):
        raise HubError(f"the repository lists a file with the unsafe name {name!r}")


def _is_foreign(name: str) -> bool:
    *folders, base = name.split("/")
    return (
        base.removesuffix(".index.json").endswith(_FOREIGN)
        or _TRAINING_STATE.fullmatch(base) is not None
        or any(_FOREIGN_FOLDER.fullmatch(folder) for folder in folders)
    )


def _depth(names: Collection[str]) -> float:
    """Folders above the topmost of the files; infinite where there are none."""
    return min((name.count("/") for name in names), default=float("inf"))


def _superseded(
    kept: Sequence[str],
    weights: Collection[str],
    suffixes: tuple[str, ...],
    stem: str,
    read_index: Callable[[str], bytes],
) -> set[str]:
    """Find the weights that another set in their folder makes superfluous."""
    dropped: set[str] = set()
    for folder in {posixpath.dirname(name) for name in weights}:
        members = {name for name in weights if posixpath.dirname(name) == folder}
        endings = tuple(f"{suffix}.index.json" for suffix in suffixes)
        indexes = [n for n in kept if posixpath.dirname(n) == folder and n.endswith(endings)]
        default = posixpath.join(folder, f"{stem}{endings[0]}")
        named = {
            posixpath.join(folder, file)
            for index in ([default] if default in indexes else indexes)
            for file in indexed_files(read_index(index))
        }
        if named & members:
            dropped |= members - named
        elif any(posixpath.basename(n).startswith((f"{stem}.", f"{stem}-")) for n in members):
            dropped |= {n for n in members if posixpath.basename(n).startswith("consolidated")}
    return dropped


def indexed_files(content: bytes) -> set[str]:
    """Read the shard names out of a ``*.index.json``; damage counts as naming none.

    Damage is for the checkpoint reader to report, which sees the same file.
    """
    try:
        weight_map = json.loads(content)["weight_map"]
        return {file for file in weight_map.values() if isinstance(file, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()

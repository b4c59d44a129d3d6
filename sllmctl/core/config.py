"""Where checkpoints live, and what a MODEL argument means."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from sllmctl.core.checkpoint import SUFFIX
from sllmctl.core.fileio import errno_text
from sllmctl.core.header import shown
from sllmctl.core.manifest import MANIFEST_NAME
from sllmctl.core.sllm_store import INDEX_NAME
from sllmctl.errors import CheckpointNotFound, ConfigError

STORAGE_VARIABLES = ("SLLMCTL_STORAGE_PATH", "STORAGE_PATH")
DEFAULT_STORAGE = "./models"
_PATH_STARTS = ("/", "./", "../", "~")
_MAX_DEPTH = 3


def storage_path(explicit: str | os.PathLike[str] | None = None) -> Path:
    """The directory that holds checkpoints as ``<org>/<name>``.

    An explicit path wins, then ``$SLLMCTL_STORAGE_PATH``, ``$STORAGE_PATH`` and ``./models``.
    """
    chosen = os.fspath(explicit) if explicit is not None else None
    for variable in STORAGE_VARIABLES:
        chosen = chosen or os.environ.get(variable)
    return Path(chosen or DEFAULT_STORAGE).expanduser()


def is_true(value: str | None) -> bool:
    """Whether a variable of the environment that is true or false is true."""
    return value is not None and value.lower() in ("1", "true", "yes", "on")


def looks_like_path(model: str) -> bool:
    """Whether a MODEL is written as a path, not as a name."""
    return model in (".", "..", "~") or model.startswith(_PATH_STARTS)


def resolve_model(
    model: str | os.PathLike[str], storage: str | os.PathLike[str] | None = None
) -> Path:
    """Find the checkpoint that a MODEL argument means.

    What starts with ``/``, ``./``, ``../`` or ``~`` is a path, as is any ``os.PathLike``; anything
    else is a name below the storage path, or failing that an existing relative directory.

    Raises:
        CheckpointNotFound: Nothing is there, or may be seen there; the hint names what is near.
        ConfigError: The name is empty, or leads out of the storage path.
    """
    if not isinstance(model, str) or looks_like_path(model):
        path = Path(model).expanduser()
        if not is_there(path):
            raise CheckpointNotFound(
                f"there is no `{path}`",
                hint="`sllmctl ls` lists the checkpoints in the storage path",
            )
        return path
    if not model or "\0" in model:
        raise ConfigError("the model's name is empty" if not model else "the name holds a NUL")
    storage_dir = storage_path(storage)
    if ".." in Path(model).parts:
        raise ConfigError(
            f"the model's name `{model}` leads out of the storage path",
            hint=f"write ./{model} for a path",
        )
    inside = storage_dir / model
    if is_there(inside):
        return inside
    if is_there(Path(model)):
        return Path(model)
    raise CheckpointNotFound(
        f"there is no checkpoint `{model}` in `{storage_dir}`", hint=_hint(model, storage_dir)
    )


def is_there(path: Path) -> bool:
    """Whether something is at a path.

    Raises:
        CheckpointNotFound: The system does not say: a directory may not be searched, for one.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as exc:
        reason = errno_text(exc) if isinstance(exc, OSError) else exc
        raise CheckpointNotFound(f"cannot look at {shown(path)}: {reason}") from exc
    return True


def find_models(storage: Path) -> Iterator[tuple[str, Path]]:
    """Walk the storage path for checkpoints: names such as ``Qwen/Qwen3-8B``, in order.

    Directories that start with a dot, as conversions in progress do, are passed over.
    """
    yield from _walk(storage, storage, _MAX_DEPTH)


def _walk(directory: Path, storage: Path, depth: int) -> Iterator[tuple[str, Path]]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError:
        return
    names = [entry.name for entry in entries]
    is_model = any(name in (MANIFEST_NAME, INDEX_NAME) or name.endswith(SUFFIX) for name in names)
    if is_model and directory != storage:
        yield str(directory.relative_to(storage)), directory
    elif depth > 0:
        for entry in entries:
            # A file, or a link that leads nowhere, has no entries and ends there.
            if not entry.name.startswith("."):
                yield from _walk(directory / entry.name, storage, depth - 1)


def _hint(model: str, storage: Path) -> str:
    from sllmctl.core.hub.fetch import find_cached

    names = [name for name, _ in find_models(storage)]
    by_end = {name.rsplit("/", 1)[-1].lower(): name for name in names}
    near = difflib.get_close_matches(model, names, n=3, cutoff=0.6)
    near += [
        by_end[end]
        for end in difflib.get_close_matches(model.rsplit("/", 1)[-1].lower(), by_end, n=2)
        if by_end[end] not in near
    ]
    if near:
        return "did you mean " + " or ".join(f"`{name}`" for name in near) + "?"
    cached = find_cached(model)
    if cached is not None:
        return f"it is in a hub cache, not converted yet: run `sllmctl convert {model}`"
    if model.count("/") == 1:
        return f"run `sllmctl convert {model}` to download and convert it, or give --storage-path"
    return "`sllmctl ls` lists what is there; a name looks like Qwen/Qwen3-8B"

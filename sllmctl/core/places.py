"""What a SOURCE argument means, and where its conversion goes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sllmctl.core.config import is_there, looks_like_path, storage_path
from sllmctl.core.hub.cache import COMMIT
from sllmctl.core.manifest import Origin
from sllmctl.errors import CheckpointNotFound

_HUGGINGFACE_FOLDER = re.compile(r"models--(.+?)--(.+)")
_MODELSCOPE_FOLDER = re.compile(r"(.+?)--(.+)")


@dataclass(frozen=True, slots=True)
class Place:
    """A source that was understood.

    Attributes:
        path: The local directory or file; None for a name on a hub.
        name: ``org/name`` of a hub, or the directory's own name: where a conversion goes below
            the storage path.
        origin: What a local source says of itself; None for the directory itself.
    """

    path: Path | None
    name: str
    origin: Origin | None = None

    def target(
        self,
        output: str | os.PathLike[str] | None = None,
        storage: str | os.PathLike[str] | None = None,
    ) -> Path:
        """Where the conversion goes: ``output``, or the name below the storage path."""
        if output is not None:
            return Path(output).expanduser()
        return storage_path(storage) / self.name


def find_source(source: str | os.PathLike[str]) -> Place:
    """Understand a SOURCE: a path, an existing relative directory, or a name on a hub.

    A snapshot in a hub's cache is known by its folder's name, and goes by the model's own.

    Raises:
        CheckpointNotFound: It is written as a path, and nothing is there, or may be seen there.
    """
    if isinstance(source, str) and not looks_like_path(source) and not is_there(Path(source)):
        return Place(None, source)
    path = Path(source).expanduser()
    if not is_there(path):
        raise CheckpointNotFound(
            f"there is no `{path}`", hint="write a model on a hub like Qwen/Qwen3-8B"
        )
    real = Path(os.path.realpath(path))
    if real.parent.name == "snapshots":
        folder, commit = real.parent.parent.name, real.name
        hub, match = "huggingface", _HUGGINGFACE_FOLDER.fullmatch(folder)
        if match is None:
            hub, match = "modelscope", _MODELSCOPE_FOLDER.fullmatch(folder)
        if match is not None and (hub == "modelscope" or COMMIT.fullmatch(commit)):
            name = f"{match[1]}/{match[2]}"
            return Place(path, name, Origin(hub=hub, name=name, revision=commit))
    return Place(path, real.stem if real.is_file() else real.name)

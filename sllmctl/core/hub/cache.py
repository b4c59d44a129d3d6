"""Where the hubs' clients keep what they downloaded, found by looking and without the clients.

Layouts, as the clients document and write them:

- Hugging Face: ``<cache>/models--<org>--<name>/refs/<revision>`` holds a commit, and
  ``snapshots/<commit>/`` the files.
- ModelScope: ``<cache>/models/<org>--<name>/snapshots/<revision>/``. Clients before 1.38 wrote
  ``models/<org>/<name>/`` with ``___`` for each dot, below ``hub/`` when the cache was the
  default one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from sllmctl.core.checkpoint import all_parts
from sllmctl.core.hub.files import indexed_files

COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def cache_root(hub: str) -> Path:
    """Return the folder in which a hub's client keeps its downloads."""
    env = os.environ
    if hub == "modelscope":
        return _expand(env.get("MODELSCOPE_CACHE") or "~/.cache/modelscope")
    home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME', '~/.cache')}/huggingface"
    return _expand(
        env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{_expand(home)}/hub"
    )


def cache_setting(hub: str) -> str:
    """Name the environment variable that moves a hub's cache."""
    if hub == "modelscope":
        return "MODELSCOPE_CACHE"
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return variable
    return "HF_HOME"


def repository_folder(name: str) -> Path:
    """Return where the Hugging Face client keeps one repository."""
    return cache_root("huggingface") / f"models--{name.replace('/', '--')}"


def find_cached(name: str) -> Path | None:
    """Return the folder of a model that sits whole in a hub's cache, or None."""
    return find_snapshot(name, "huggingface") or find_snapshot(name, "modelscope")


def find_snapshot(name: str, hub: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model in one hub's cache, if every weight file is there.

    Args:
        name: ``org/name``.
        hub: ``huggingface`` or ``modelscope``.
        revision: Branch, tag or commit; None takes what the hub's client takes by default.
    """
    if name.count("/") != 1 or ".." in name:
        return None
    folders = _modelscope_folders if hub == "modelscope" else _huggingface_folders
    return next((folder for folder in folders(name, revision) if _is_whole(folder)), None)


def modelscope_target(name: str, revision: str) -> Path:
    """Return the folder that the ModelScope client downloads into."""
    legacy = next((f for f in _legacy_folders(name) if f.is_dir() and any(f.iterdir())), None)
    return legacy or _modelscope_snapshots(name) / revision


def _expand(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _huggingface_folders(name: str, revision: str | None) -> Iterator[Path]:
    repository = repository_folder(name)
    snapshots = repository / "snapshots"
    if revision is not None and COMMIT.fullmatch(revision):
        yield snapshots / revision
        return
    try:
        commit = (repository / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        if revision is None:
            yield from _newest_first(snapshots)
        return
    if COMMIT.fullmatch(commit):
        yield snapshots / commit


def _modelscope_folders(name: str, revision: str | None) -> Iterator[Path]:
    snapshots = _modelscope_snapshots(name)
    if revision is not None:
        yield snapshots / revision
        return
    yield from _legacy_folders(name)
    yield snapshots / "master"
    yield from _newest_first(snapshots)


def _modelscope_snapshots(name: str) -> Path:
    return cache_root("modelscope") / "models" / name.replace("/", "--") / "snapshots"


def _legacy_folders(name: str) -> list[Path]:
    owner, model = name.split("/")
    root = cache_root("modelscope")
    encoded = Path("models", owner, model.replace(".", "___"))
    return [root / encoded, root / "hub" / encoded]


def _newest_first(snapshots: Path) -> list[Path]:
    try:
        return sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []


def _is_whole(folder: Path) -> bool:
    """Say whether a folder has weights and misses none that its indexes or shard names promise."""
    try:
        names = {path.name for path in folder.iterdir() if path.is_file()}
        weights = {name for name in names if name.endswith(_WEIGHTS)}
        indexes = {name for name in names if name.endswith(".safetensors.index.json")} or {
            name for name in names if name.endswith(".bin.index.json")
        }
        promised = {f for name in indexes for f in indexed_files((folder / name).read_bytes())}
    except OSError:
        return False
    if not promised:
        promised = all_parts(weights)
    return bool(weights) and promised <= names

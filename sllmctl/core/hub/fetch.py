"""Getting a model from Hugging Face or ModelScope into the local cache.

The hubs' own clients do the work, in a child process; what is already in their caches is used.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sllmctl.core.config import is_true
from sllmctl.core.hub.cache import COMMIT, cache_root, find_cached, find_snapshot
from sllmctl.core.hub.errors import TITLES, not_enough_room, redact, to_error, unreachable_both
from sllmctl.core.hub.files import choose_files
from sllmctl.core.hub.process import ClientError, Plan, Request, run_client
from sllmctl.core.progress import ProgressFn
from sllmctl.errors import ConfigError, HubError

__all__ = ["HUBS", "Download", "fetch", "find_cached"]

HUBS = ("auto", "huggingface", "modelscope")
FALLBACK_DEADLINE_S = 10.0
REACH_DEADLINE_S = 60.0
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"\w[\w.+-]*(?:/\w[\w.+-]*)*", re.ASCII)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Download:
    """A model in a hub's local cache.

    Attributes:
        path: The folder with the files; it may hold others besides.
        hub: The hub that served it, ``huggingface`` or ``modelscope``.
        name: ``org/name``.
        revision: The commit, where the hub tells it; else the branch or tag.
        files: The names that were asked for, relative to ``path``, sorted.
    """

    path: Path
    hub: str
    name: str
    revision: str
    files: tuple[str, ...]


def fetch(
    name: str,
    *,
    hub: str = "auto",
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: ProgressFn | None = None,
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> Download:
    """Download a model, or take it from the cache where that is current.

    Args:
        name: ``org/name``.
        hub: ``huggingface``, ``modelscope``, or ``auto``: what ``SLLMCTL_HUB`` or
            ``VLLM_USE_MODELSCOPE`` says, else Hugging Face, and ModelScope if that cannot be
            reached within 10 s and no revision is asked for.
        revision: Branch, tag or commit; None is the hub's default branch.
        include: Glob patterns; only files that match one are fetched.
        exclude: Glob patterns; files that match one are left out.
        progress: Called with the stage ``download``; bytes already there count as done.
        free_bytes: Returns the free space of the filesystem of a folder.

    Raises:
        ConfigError: The name, the revision or the hub is none.
        HubError: The hub refused, failed or cannot be reached, or the disk is too small.
    """
    chosen = _choose_hub(hub)
    _check_names(name, chosen, revision)
    offline = _offline_variable()
    if offline is not None:
        return _fetch_offline(name, chosen, revision, include, exclude, offline)

    def attempt(hub: str, reach_deadline_s: float) -> Download:
        def approve(plan: Plan) -> None:
            if not plan.files:
                raise _nothing_left(name, include, exclude)
            needed = plan.total_bytes - plan.done_bytes
            free = free_bytes(_existing_parent(cache_root(hub)))
            if needed > free:
                raise not_enough_room(hub, needed, free)

        request = Request(hub, name, revision, include, exclude, reach_deadline_s)
        path, plan = run_client(request, approve=approve, progress=progress)
        return Download(path, hub, name, plan.revision, plan.files)

    first = "huggingface" if chosen == "auto" else chosen
    try:
        return attempt(first, FALLBACK_DEADLINE_S if chosen == "auto" else REACH_DEADLINE_S)
    except ClientError as exc:
        out_of_reach = exc.reason in {"unreachable", "proxy"} and not exc.planned
        if not out_of_reach:
            raise to_error(name, exc, revision) from exc
        failure = exc
    cached = _from_cache(name, first, revision, include, exclude)
    if cached is not None:
        log.warning(
            "cannot reach %s (%s); using `%s` from its cache, revision %s",
            TITLES[first],
            redact(failure.detail),
            name,
            cached.revision,
        )
        return cached
    if chosen != "auto" or revision is not None:
        raise to_error(name, failure, revision) from failure
    log.warning(
        "cannot reach Hugging Face (%s); asking ModelScope for `%s`", redact(failure.detail), name
    )
    try:
        return attempt("modelscope", REACH_DEADLINE_S)
    except ClientError as exc:
        if exc.reason in {"unreachable", "proxy"} and not exc.planned:
            raise unreachable_both(name, failure, exc) from exc
        raise to_error(name, exc) from exc


def _choose_hub(hub: str) -> str:
    source = "--hub"
    if hub == "auto" and os.environ.get("SLLMCTL_HUB"):
        hub, source = os.environ["SLLMCTL_HUB"].lower(), "SLLMCTL_HUB"
    if hub not in HUBS:
        raise ConfigError(f"{source}: `{hub}` is not a hub", hint=f"use one of {', '.join(HUBS)}")
    if hub == "auto" and is_true(os.environ.get("VLLM_USE_MODELSCOPE")):
        return "modelscope"
    return hub


def _check_names(name: str, hub: str, revision: str | None) -> None:
    """Refuse what no hub would accept, before it becomes part of a path or an address."""
    # Source: validate_repo_id of huggingface_hub; ModelScope is known to allow a double dash.
    allowed = (
        _NAME.fullmatch(name)
        and ".." not in name
        and not name.endswith(".git")
        and (hub == "modelscope" or ("--" not in name and len(name) <= 96))
    )
    if not allowed:
        raise ConfigError(
            f"`{name}` is not a model name on a hub",
            hint="write it like Qwen/Qwen3-8B, or a local directory like ./models/qwen3",
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ConfigError(
            f"`{revision}` is not a revision", hint="give a branch, a tag or a commit of the model"
        )


def _offline_variable() -> str | None:
    """Name the variable that forbids to ask a hub, as the Hugging Face client reads them."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        value = os.environ.get(variable)
        if value:
            return variable if is_true(value) else None
    return None


def _fetch_offline(
    name: str,
    hub: str,
    revision: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    variable: str,
) -> Download:
    hubs = ("huggingface", "modelscope") if hub == "auto" else (hub,)
    for one in hubs:
        cached = _from_cache(name, one, revision, include, exclude)
        if cached is not None:
            return cached
    at = f" at revision `{revision}`" if revision else ""
    places = " or ".join(str(cache_root(one)) for one in hubs)
    raise HubError(
        f"`{name}`{at} is not, or not whole, in {places}, and {variable} forbids to download it",
        hint=f"unset {variable}, or fetch it once where the network is allowed",
    )


def _from_cache(
    name: str, hub: str, revision: str | None, include: Sequence[str], exclude: Sequence[str]
) -> Download | None:
    path = find_snapshot(name, hub, revision)
    if path is None:
        return None
    present = [
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.is_file() and not file.name.endswith(".incomplete")
    ]
    files = choose_files(
        present,
        include=include,
        exclude=exclude,
        read_index=lambda file: (path / file).read_bytes(),
    )
    if not files:
        raise _nothing_left(name, include, exclude)
    known = COMMIT.fullmatch(path.name) or path.parent.name == "snapshots"
    return Download(path, hub, name, path.name if known else "master", tuple(files))


def _nothing_left(name: str, include: Sequence[str], exclude: Sequence[str]) -> HubError:
    patterns = [f"--include {pattern}" for pattern in include]
    patterns += [f"--exclude {pattern}" for pattern in exclude]
    return HubError(
        f"no file of `{name}` is left to download"
        + (f" with {' '.join(patterns)}" * bool(patterns)),
        hint="patterns are matched against whole names such as model-00001-of-00004.safetensors",
    )


def _existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())

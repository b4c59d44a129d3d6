"""Where an engine's weights come from: what its loader was asked for, the checkpoint, the store."""

from __future__ import annotations

import difflib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sllmctl import api
from sllmctl.core.checkpoint import SUFFIX, Checkpoint, Shard, open_checkpoint
from sllmctl.core.config import looks_like_path, resolve_model, storage_path
from sllmctl.core.header import load_json
from sllmctl.core.load import LoadOptions, LoadStats, open_shard
from sllmctl.core.places import find_source
from sllmctl.core.views import read_ahead
from sllmctl.errors import CheckpointError, CheckpointNotFound, ConfigError, SllmError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CheckLevel = Literal["full", "names", "off"]
RankStateUse = Literal["off", "auto", "require"]
STORE_VARIABLE = "SLLMCTL_STORE"
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "store": ("auto", "require", "off"),
    "check": ("full", "names", "off"),
    "rank_state": ("off", "auto", "require"),
}
_KEYS = ("model", "storage_path", "store", "socket", "verify", "check", "rank_state")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine's user asked of our loader.

    Attributes:
        model: A path or a name below the storage path, instead of the engine's own model.
        models: The same by the engine's model, for those who load several.
        storage_path: Where names are looked up; see ``core.config.storage_path``.
        store: ``auto`` uses a store that answers, ``require`` no other way, ``off`` none.
        socket: The store's, instead of the usual ones.
        verify: Compare every byte with the digests of the conversion.
        check: What must have arrived: every byte of every parameter (``full``), something for
            every parameter (``names``), or whatever the engine makes do with (``off``).
        rank_state: ``auto`` uses what a rank wrote after an earlier load, or writes it;
            ``require`` uses nothing else.
    """

    model: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    storage_path: Path | None = None
    store: api.StoreUse = "auto"
    socket: Path | None = None
    verify: bool = False
    check: CheckLevel = "full"
    rank_state: RankStateUse = "off"

    @classmethod
    def parse(cls, extra: object) -> EngineOptions:
        """Check the engine's extra configuration of the loader, a mapping.

        Raises:
            ConfigError: An option is unknown, or its value makes no sense.
        """
        if not isinstance(extra, Mapping):
            raise ConfigError(f"the loader's extra configuration is not a JSON object: {extra!r}")
        for key in extra:
            if key not in _KEYS:
                near = difflib.get_close_matches(str(key), _KEYS, n=1)
                raise ConfigError(
                    f"sllmctl's loader has no option `{key}`",
                    hint=f"did you mean `{near[0]}`?" if near else f"it has {', '.join(_KEYS)}",
                )
        store = os.environ.get(STORE_VARIABLE) or "auto"
        asked: dict[str, Any] = {"store": store, "check": "full", "rank_state": "off"}
        asked |= {key: value for key, value in extra.items() if value is not None}
        for key, choices in _CHOICES.items():
            if asked[key] not in choices:
                raise ConfigError(
                    f"`{asked[key]}` is not a value of `{key}`", hint="; ".join(choices)
                )
        model = asked.get("model")
        models = dict(model) if isinstance(model, Mapping) else {}
        for text in [*models, *models.values()] if models else [model]:
            if text is not None and (not isinstance(text, str) or not text):
                raise ConfigError(f"`{text}` is not a model", hint="give a path or a name")
        for key in ("storage_path", "socket"):
            if not isinstance(asked.get(key, ""), str):
                raise ConfigError(f"`{asked[key]}` is not a path", hint=f"give `{key}` as text")
        verify = asked.get("verify", False)
        if not isinstance(verify, bool):
            raise ConfigError(f"`{verify}` is not a value of `verify`", hint="true; false")
        return cls(
            model=None if models else model,
            models=models,
            storage_path=_path(asked.get("storage_path")),
            store=asked["store"],
            socket=_path(asked.get("socket")),
            verify=verify,
            check=asked["check"],
            rank_state=asked["rank_state"],
        )

    def _name_of(self, path: Path) -> str | None:
        """The name of what lies below the storage path."""
        below = Path(os.path.realpath(storage_path(self.storage_path)))
        real = Path(os.path.realpath(path))
        return str(real.relative_to(below)) if below in real.parents else None

    def label_for(self, found: FoundModel) -> str:
        """How the store shows a model: by its name, where it has one."""
        return (self._name_of(found.path) if found.path else None) or found.model

    def model_for(self, engine_model: str) -> str:
        """What to load when the engine wants a model: the option's, or the engine's own.

        An engine that was started from a directory without weights, or from a snapshot in a hub's
        cache, gets the checkpoint of that name below the storage path.
        """
        asked = self.models.get(engine_model) or self.model
        if asked is not None:
            return asked
        path = Path(engine_model)
        if not path.is_dir():
            return engine_model
        if _has_weights(path):
            # As a path: an engine prefers the directory to what has its name elsewhere.
            return engine_model if looks_like_path(engine_model) else f"./{engine_model}"
        if (name := self._name_of(path)) is not None:
            return name
        place = find_source(path)
        return place.name if place.origin is not None else engine_model


def _path(text: Any) -> Path | None:
    return Path(text).expanduser() if text else None


def _has_weights(path: Path) -> bool:
    try:
        return any(entry.name.endswith(SUFFIX) for entry in path.iterdir())
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model before anything of it is loaded.

    Attributes:
        model: What to load, as a path or a name.
        path: Where its files are, or None when the store alone may have it.
        checkpoint: Its index, where its files are.
    """

    model: str
    path: Path | None
    checkpoint: Checkpoint | None


def find_model(options: EngineOptions, engine_model: str) -> FoundModel:
    """Find the checkpoint that an engine wants, and see that it fits the engine's model.

    Args:
        options: The user's.
        engine_model: What the engine calls the model: a path or a name on a hub.

    Raises:
        CheckpointNotFound: No checkpoint is there, nor a store to ask.
        CheckpointError: It is damaged, or of another architecture.
    """
    model = options.model_for(engine_model)
    try:
        path = resolve_model(model, options.storage_path)
        checkpoint = open_checkpoint(path)
    except CheckpointNotFound as exc:
        if options.store == "off" or looks_like_path(model):
            if model == engine_model and Path(model).is_dir():
                exc.hint = (
                    f"{exc.hint}; or name the checkpoint as `model` in the loader's extra "
                    "configuration"
                )
            raise
        return FoundModel(model, None, None)
    _require_same_architecture(Path(engine_model), path)
    return FoundModel(model, path, checkpoint)


class EngineWeights:
    """The weights of one load: opened before the model is built, let go when it is filled.

    Attributes:
        found: What is loaded.
        stats: What the load did.
    """

    def __init__(
        self,
        found: FoundModel,
        options: EngineOptions,
        *,
        rank: int = 0,
        ranks: int = 1,
        keeps: bool = False,
        label: str | None = None,
    ) -> None:
        """Load from the store or from disk.

        Args:
            found: The model.
            options: The user's.
            rank: Which of the processes on this machine that load the same model this one is.
            ranks: How many they are. They share the page cache, and each reads a part ahead.
            keeps: It may write a state of what it loads: it compares the bytes itself.
            label: How the store shows the model; by its name when not given.

        Raises:
            StoreError: A store is required, and cannot serve the load.
            SllmError: As ``api.load`` raises them.
        """
        self.found = found
        # One rank's verdict on the bytes that all share is enough for a load.
        choice = LoadOptions.choose(verify=options.verify and (rank == 0 or keeps))
        if ranks > 1 and choice.map_files == "auto":
            choice = replace(choice, map_files="always")
        loaded = api.load(
            found.model,
            storage_path=options.storage_path,
            store=options.store,
            socket=options.socket,
            label=label or options.label_for(found),
            options=choice,
        )
        self.stats: LoadStats = loaded.stats
        self._tensors = loaded.tensors
        if ranks > 1 and found.checkpoint is not None and not self.stats.store_bytes:
            _read_ahead(found.checkpoint.shards, choice, rank, ranks)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, aliases included."""
        return frozenset(self._tensors)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, view)`` in file order, aliases last: on cpu, valid until `close`."""
        yield from self._tensors.items()

    def close(self) -> None:
        """Let go of the memory, and of the store's lease; views that others keep stay valid."""
        self._tensors = {}


def _require_same_architecture(engine_path: Path, path: Path) -> None:
    """Refuse weights of another architecture than the configuration that the engine was given."""
    ours, theirs = (_architectures(place / "config.json") for place in (path, engine_path))
    if ours and theirs and ours.isdisjoint(theirs):
        raise CheckpointError(
            f"`{path}` holds a {', '.join(sorted(ours))}, "
            f"and `{engine_path}` is a {', '.join(sorted(theirs))}",
            hint="name the checkpoint of the engine's model in the loader's extra configuration",
        )


def _architectures(path: Path) -> frozenset[str]:
    try:
        named = load_json(path.read_bytes(), "config.json").get("architectures")
    except (OSError, CheckpointError):
        return frozenset()
    return frozenset(map(str, named)) if isinstance(named, list) else frozenset()


def _read_ahead(shards: tuple[Shard, ...], options: LoadOptions, rank: int, ranks: int) -> None:
    """Bring this rank's part of the files into the page cache, where all ranks find it.

    Page faults alone would read little at a time, and one after the other.
    """

    def run() -> None:
        for number, shard in enumerate(shards):
            try:
                with ExitStack() as stack:
                    fd = open_shard(shard, stack)
                    read_ahead(shard, fd, options, (rank + number) % ranks, ranks)
            except SllmError as exc:  # who looks at the bytes will hear of it
                log.debug("no read-ahead of `%s`: %s", shard.path, exc)
                return  # or the process ends

    threading.Thread(target=run, name="sllm-ahead", daemon=True).start()


def describe(stats: LoadStats) -> str:
    """Say in one line what a load did."""
    # What is mapped from files counts as in the page cache; for several ranks it may not be yet.
    mapped = 0 if stats.store_bytes else stats.mapped_bytes - stats.brought_in_bytes
    parts = [
        f"{count} {word}"
        for count, word in (
            (stats.store_bytes, "from the store"),
            (mapped, "mapped from files"),
            (stats.page_cache_bytes - mapped, "from the page cache"),
            (stats.disk_bytes, "from disk"),
        )
        if count
    ]
    verified = ", verified" if stats.verified else ""
    return (
        f"{stats.tensors} tensors, {stats.bytes} bytes: {', '.join(parts) or 'none read'}"
        f"{verified}, {stats.elapsed_s:.3f} s"
    )


@contextmanager
def telling_hints() -> Iterator[None]:
    """Put an error's hint into its message: an engine's log knows no hints."""
    try:
        yield
    except SllmError as exc:
        exc.message = with_hint(exc)
        exc.hint = None
        raise


def with_hint(exc: SllmError) -> str:
    """An error's text for an engine's log, which knows no hints."""
    return f"{exc} ({exc.hint})" if exc.hint else str(exc)

"""Rank state: what one rank of an engine holds after a load, kept for its next start.

An engine cuts and fuses a checkpoint's tensors for each rank. What comes out, before the engine
processes it further, is written to ``<model>/rank_state/<fingerprint>/rank_<N>`` as a checkpoint of
its own; a rank that finds its part reads nothing else. It fits the very same engine, model and
settings alone, which the fingerprint says.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sllmctl.core.checkpoint import Checkpoint, open_checkpoint
from sllmctl.core.header import load_json
from sllmctl.core.manifest import MANIFEST_NAME
from sllmctl.core.write.save import save_tensors
from sllmctl.errors import CheckpointError
from sllmctl.integrations.engine_source import FoundModel

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

DIRECTORY = "rank_state"
STATE_NAME = "rank_state.json"
FORMAT_VERSION = 1
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class RankKey:
    """Which rank's state, made by what.

    Attributes:
        model: The checkpoint's directory.
        rank: Among the ranks that hold parts of one copy of the model.
        made_by: Everything that the state depends on, as JSON: engine, versions, settings,
            checkpoint.
    """

    model: Path
    rank: int
    made_by: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits."""
        text = json.dumps(self.made_by, sort_keys=True, ensure_ascii=False)
        return xxhash.xxh3_128_hexdigest(text.encode())[:16]

    @property
    def path(self) -> Path:
        """Where the state is, or goes."""
        return self.model / DIRECTORY / self.fingerprint / f"rank_{self.rank}"


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Identify a checkpoint's bytes: by its digests, if it has any, and by its files' stamps.

    The stamps count beside the digests, which say what `convert` wrote: they stay as they are when
    somebody puts another file in the place of a shard.
    """
    hasher = xxhash.xxh3_128()
    if checkpoint.manifest is not None:
        for digest in checkpoint.manifest.shards:
            hasher.update(f"{digest.name} {digest.size} {digest.digest}\n".encode())
    for shard in checkpoint.shards:
        hasher.update(f"{shard.path.name} {shard.size} {(shard.stamp or (0,))[-1]}\n".encode())
    return f"{'files' if checkpoint.manifest is None else 'digests'}:{hasher.hexdigest()}"


def find_rank_state(key: RankKey) -> FoundModel:
    """Find a rank's state.

    Raises:
        CheckpointError: There is none that fits; the message says in what others differ. Or it is
            damaged.
    """
    if (key.path / MANIFEST_NAME).exists():
        _require_same(key, _made_by(key.path))
        return FoundModel(str(key.path), key.path, open_checkpoint(key.path))
    others = sorted((key.model / DIRECTORY).glob(f"*/rank_*/{STATE_NAME}"))
    if not others:
        raise CheckpointError(
            f"`{key.model}` has no rank state",
            hint="run `sllmctl convert --engine`, or load once with rank_state=auto",
        )
    reasons = []
    for other in others:
        with suppress(CheckpointError):  # a damaged one is no reason why none fits
            reasons.append(_differences(key.made_by, _made_by(other.parent)))
    nearest = min(reasons, key=len, default=["all of them are damaged"])
    raise CheckpointError(
        f"no rank state of `{key.model}` fits rank {key.rank}: "
        + (", ".join(nearest[:_SHOWN]) if nearest else "it was written for other ranks only"),
        hint="run `sllmctl convert --engine` with this engine and these settings, "
        "or load once with rank_state=auto",
    )


def _made_by(path: Path) -> dict[str, Any]:
    try:
        document = load_json((path / STATE_NAME).read_bytes(), STATE_NAME)
        made_by = document["made_by"]
        if not isinstance(made_by, dict) or document["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {document['format_version']}")
    except (OSError, ValueError, KeyError, CheckpointError) as exc:
        raise CheckpointError(
            f"damaged rank state `{path}`: {exc}", hint=f"remove `{path}`; it is made anew"
        ) from exc
    return made_by


def _require_same(key: RankKey, made_by: Mapping[str, Any]) -> None:
    if differences := _differences(key.made_by, made_by):
        raise CheckpointError(
            f"rank state `{key.path}` is not what its name says: {', '.join(differences)}",
            hint=f"remove `{key.path}`; it is made anew",
        )


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and persistent buffers, tied ones under each of their names."""
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def shapes_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a rank state must agree with: dtype, shape and kind of place of each tensor."""
    return {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.device.type)
        for name, tensor in state_of(model).items()
    }


def save_rank_state(key: RankKey, model: nn.Module, before: Mapping[str, tuple[Any, ...]]) -> None:
    """Write what a rank holds, in one step; another process may write another rank's.

    Args:
        key: Of the state.
        model: After its weights were loaded, before they are processed.
        before: ``shapes_of`` the model before the load: a fresh model must be able to take it.

    Raises:
        CheckpointError: The load itself changed what the model is made of, so that its state
            cannot be put into a fresh one. Or the state cannot be written.
        ConfigError: Another process writes the same, or the disk is too small.
    """
    started = time.perf_counter()
    if changed := _differences(before, shapes_of(model)):
        raise CheckpointError(
            f"a {type(model).__name__} changes while it is loaded ({changed[0]}): "
            "its state cannot be kept",
        )
    document = {"format_version": FORMAT_VERSION, "rank": key.rank, "made_by": dict(key.made_by)}
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    made = save_tensors(state_of(model), key.path, files={STATE_NAME: text.encode()})
    log.info(
        "rank state of %d tensors, %d bytes written to `%s` in %.1f s",
        made.tensors,
        made.bytes,
        key.path,
        time.perf_counter() - started,
    )


def fill_from_rank_state(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], *, where: str
) -> None:
    """Copy a rank's state into a fresh model.

    Raises:
        CheckpointError: Names, dtypes or shapes differ; nothing was copied.
    """
    import torch

    state = state_of(model)
    here = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    there = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if differences := _differences(here, there):
        raise CheckpointError(
            f"rank state `{where}` does not fit a {type(model).__name__}: "
            + "; ".join(differences[:_SHOWN]),
            hint=f"remove `{where}`; it is made anew",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)

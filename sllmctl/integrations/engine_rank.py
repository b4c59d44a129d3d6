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
from sllmctl.integrations.engine_state import Snapshot, differences, state_of

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

DIRECTORY = "rank_state"
STATE_NAME = "rank_state.json"
VERIFIED_NAME = "verified"
FORMAT_VERSION = 2
"""Version 1 kept models whose load does more than fill their state."""
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


def find_rank_state(key: RankKey, *, verified: bool = False) -> FoundModel:
    """Find a rank's state.

    Args:
        key: Of the state.
        verified: Take none of a load that did not compare the checkpoint's bytes with its digests:
            the state's own digests are of what that load read.

    Raises:
        CheckpointError: There is none that fits; the message says in what others differ. Or it is
            damaged.
    """
    if (key.path / MANIFEST_NAME).exists():
        _require_same(key, _made_by(key.path))
        if verified and not (key.path / VERIFIED_NAME).exists():
            raise CheckpointError(
                f"the rank state `{key.path}` is of a load that did not verify its checkpoint",
                hint="load once with verify and rank_state=auto: it is written anew",
            )
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
            reasons.append(differences(key.made_by, _made_by(other.parent)))
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
        if document["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {document['format_version']}")
        made_by = document["made_by"]
        if not isinstance(made_by, dict):
            raise ValueError("it does not say what made it")
    except (OSError, ValueError, KeyError, CheckpointError) as exc:
        raise CheckpointError(
            f"damaged or outdated rank state `{path}`: {exc}",
            hint=f"remove `{path}`; it is made anew",
        ) from exc
    return made_by


def _require_same(key: RankKey, made_by: Mapping[str, Any]) -> None:
    if found := differences(key.made_by, made_by):
        raise CheckpointError(
            f"rank state `{key.path}` is not what its name says: {', '.join(found)}",
            hint=f"remove `{key.path}`; it is made anew",
        )


def save_rank_state(
    key: RankKey, model: nn.Module, before: Snapshot, *, verified: bool = False
) -> None:
    """Write what a rank holds, in one step; another process may write another rank's.

    Args:
        key: Of the state.
        model: After its weights were loaded, before they are processed.
        before: Of the model before the load: a fresh model must be able to take its state.
        verified: The load compared the checkpoint's bytes with its digests.

    Raises:
        CheckpointError: The load changed more of the model than its state, which a fresh one would
            lack. Or the state cannot be written.
        ConfigError: Another process writes the same, or the disk is too small.
    """
    started = time.perf_counter()
    if changed := before.changes(model):
        raise CheckpointError(
            f"a {type(model).__name__} changes while it is loaded ({changed[0]}): "
            "its state cannot be kept",
        )
    document = {
        "format_version": FORMAT_VERSION,
        "rank": key.rank,
        "made_by": dict(key.made_by),
    }
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    files = {STATE_NAME: text.encode()} | ({VERIFIED_NAME: b""} if verified else {})
    made = save_tensors(state_of(model), key.path, files=files)
    log.info(
        "rank state of %d tensors, %d bytes written to `%s` in %.1f s",
        made.tensors,
        made.bytes,
        key.path,
        time.perf_counter() - started,
    )


def mark_verified(path: Path) -> None:
    """Note of a state that the checkpoint that it is of was found whole.

    Raises:
        OSError: That cannot be written.
    """
    (path / VERIFIED_NAME).touch()


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
    if found := differences(here, there):
        raise CheckpointError(
            f"rank state `{where}` does not fit a {type(model).__name__}: "
            + "; ".join(found[:_SHOWN]),
            hint=f"remove `{where}`; it is made anew",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)

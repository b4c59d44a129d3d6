"""Convert what sllm-store saved of a model in parallel: directories `rank_0`, `rank_1`, ….

Each holds one process's part of the model, under the names and in the slices of vLLM's own classes.
Nothing in it says how parts were cut, so they cannot be joined: each becomes a checkpoint of its
own, and all of them take their place together.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sllmctl.core.manifest import Origin
from sllmctl.core.sllm_store import find_ranks
from sllmctl.core.write.assemble import copy_file
from sllmctl.core.write.convert import KEEP, ConvertResult, check_places, convert
from sllmctl.core.write.sources import has_weights, list_beside
from sllmctl.core.write.target import Target, require_replaceable
from sllmctl.errors import CheckpointError, ConfigError


def is_rank_save(source: Path) -> bool:
    """Whether a directory has ranks, and no weights beside them."""
    return source.is_dir() and bool(find_ranks(source)) and not has_weights(source)


def convert_ranks(
    source: Path,
    target: Path,
    *,
    dtype: str = KEEP,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = False,
    origin: Origin | None = None,
    **options: Any,
) -> ConvertResult:
    """Convert every rank, each to a checkpoint in a directory of its own name.

    Args and errors: as `convert`; the ranks' dtype stays as it is.
    """
    started = time.perf_counter()
    ranks = find_ranks(source)
    check_places(source, target)
    for number, rank in enumerate(ranks):
        if rank.name != f"rank_{number}":
            raise CheckpointError(
                f"`{source}` has `{rank.name}` and no `rank_{number}`",
                hint="the copy is incomplete; a single rank can be converted by its path",
            )
    if dtype != KEEP:
        raise ConfigError(
            f"`{source}` holds ranks of an engine, which are not cast to {dtype}",
            hint="leave out --dtype, or convert the original model",
        )

    def convert_into(directory: Path) -> list[ConvertResult]:
        return [
            convert(
                rank,
                directory / rank.name,
                include=include,
                exclude=exclude,
                origin=origin or Origin(path=os.path.realpath(rank)),
                **options,
            )
            for rank in ranks
        ]

    if not force and all((target / rank.name).is_dir() for rank in ranks):
        return _sum(source, target, convert_into(target), started)  # the same, or refused
    require_replaceable(target, force=force)
    names = {rank.name for rank in ranks}
    beside = list_beside(source, without=names, include=include, exclude=exclude)
    # A rank that was complete when a conversion was killed is not taken up again.
    with Target(target, fingerprint=uuid.uuid4().hex, force=force) as whole:
        parts = convert_into(whole.directory)
        for file in beside:
            copy_file(whole.directory, file)
        whole.publish()
    return _sum(source, target, parts, started)


def _sum(
    source: Path, target: Path, parts: Sequence[ConvertResult], started: float
) -> ConvertResult:
    warnings = [warning for part in parts for warning in part.warnings]
    warnings.append(
        f"`{target}` holds {len(parts)} ranks as vLLM cut the model: load each by its path; the "
        "original model converts to one checkpoint for any degree of parallelism"
    )
    return replace(
        parts[0],
        source=str(source),
        path=target,
        tensors=sum(part.tensors for part in parts),
        bytes=sum(part.bytes for part in parts),
        shards=sum(part.shards for part in parts),
        elapsed_s=time.perf_counter() - started,
        write_s=sum(part.write_s for part in parts),
        verify_s=sum(part.verify_s for part in parts),
        already=all(part.already for part in parts),
        warnings=tuple(dict.fromkeys(warnings)),
    )

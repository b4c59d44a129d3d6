"""Turn a model directory into a checkpoint: safetensors laid out for fast loads, with digests."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import xxhash

from sllmctl.core.checkpoint import SINGLE_NAME, Format, open_checkpoint
from sllmctl.core.dtypes import CAST_CODES
from sllmctl.core.fileio import read_file
from sllmctl.core.manifest import Manifest, Origin, read_manifest
from sllmctl.core.progress import ProgressFn
from sllmctl.core.write.assemble import Recipe, assemble
from sllmctl.core.write.layout import DEFAULT_SHARD_BYTES
from sllmctl.core.write.sllm_store_modules import complete_for_sllm_store
from sllmctl.core.write.sllm_store_source import open_sllm_store_files
from sllmctl.core.write.sources import (
    Listing,
    Weights,
    list_source,
    open_safetensors,
    source_stamps,
)
from sllmctl.core.write.target import require_replaceable
from sllmctl.errors import CheckpointError, ConfigError

KEEP = "keep"
DTYPES = (KEEP, *CAST_CODES)
FORMATS: tuple[Format, ...] = get_args(Format)
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_CONFIG_NAME = "config.json"
_LAYOUT_VERSION = 1
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion did; times in seconds.

    Attributes:
        source: The directory, or the hub's name of the model.
        path: The checkpoint.
        tensors: Stored tensors; aliases do not count.
        bytes: Bytes of stored tensors.
        shards: Number of shards.
        elapsed_s: All of it.
        write_s: Until everything was on disk.
        verify_s: Reading it back.
        already: Nothing was to do: the checkpoint was there, of the same source and options.
        resumed: Shards that an earlier conversion, which was killed, had completed.
        warnings: What a person should know.
    """

    source: str
    path: Path
    tensors: int
    bytes: int
    shards: int
    elapsed_s: float
    write_s: float = 0.0
    verify_s: float = 0.0
    already: bool = False
    resumed: int = 0
    warnings: tuple[str, ...] = ()


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str = KEEP,
    file_format: Format = "safetensors",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    files: Sequence[str] | None = None,
    force: bool = False,
    verify: bool = True,
    origin: Origin | None = None,
    progress: ProgressFn | None = None,
) -> ConvertResult:
    """Convert a local model directory.

    Memory stays within a few hundred MiB whatever the model's size. The target appears complete
    or not at all; a conversion that was killed is taken up where it was.

    Args:
        source: Directory of safetensors or torch files, or one such file.
        target: Directory to make. Its parent directories are made too.
        dtype: ``keep``, or what tensors of the main floating dtype become: ``bfloat16``,
            ``float16``, ``float32``.
        file_format: ``safetensors``, or ``sllm-store`` for those who run its server.
        max_shard_bytes: A shard is no larger, unless a single tensor is.
        include: Patterns of relative file names; only files that match take part.
        exclude: Patterns of relative file names that take no part.
        files: Relative file names; others take no part.
        force: Replace a checkpoint that is at the target.
        verify: Read the shards back from the disk and compare the digests.
        origin: Where the source is from; the directory when not given.
        progress: Called with stages ``convert`` and ``verify``.

    Raises:
        CheckpointNotFound: There are no weights.
        CheckpointError: The source is damaged, or changed meanwhile; or the target cannot be
            written.
        ChecksumMismatch: What was written does not read back.
        ConfigError: Source, target and options contradict each other, or the disk is too small.
        ReadError: A file cannot be read.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise ConfigError(f"`{dtype}` is not a dtype to convert to", hint="; ".join(DTYPES))
    if file_format not in FORMATS:
        raise ConfigError(f"`{file_format}` is not a format to convert to", hint="; ".join(FORMATS))
    source = Path(source)
    place = os.fsencode(os.path.realpath(source)).decode(errors="backslashreplace")
    origin = origin or Origin(path=place)
    check_places(source, target)

    def look() -> Listing:
        return list_source(source, include=include, exclude=exclude, files=files)

    listing = look()
    recipe = Recipe(
        target=target,
        fingerprint=_fingerprint(listing, origin, dtype, max_shard_bytes, file_format),
        origin=origin,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        force=force,
        verify=verify,
        format=file_format,
        single_name=_single_name(listing),
    )
    there = None if force else _find_same(recipe)
    if there is not None:
        return _result(origin.name or str(source), recipe, there, started, already=True)
    require_replaceable(target, force=force)
    weights = _open_weights(listing)
    copies = list(listing.others)
    files_to_write: dict[str, bytes] = {}
    cast = None
    warnings = [*listing.warnings, *weights.warnings]
    try:
        config = _read_config(listing) if dtype != KEEP or file_format == "sllm-store" else {}
        if dtype != KEEP:
            from sllmctl.core.write.cast import Cast
            from sllmctl.core.write.float32 import kept_in_float32

            cast = Cast(weights, dtype, config, kept_in_float32(config, dtype))
            weights = cast.weights
            rewritten = cast.rewrite_config(config)
            if rewritten is not None:
                files_to_write[_CONFIG_NAME] = rewritten
                copies = [file for file in copies if file.name != _CONFIG_NAME]
        if file_format == "sllm-store":
            weights, module_files, notes = complete_for_sllm_store(weights, config)
            files_to_write |= module_files
            warnings += notes
    except BaseException:
        weights.close()
        raise

    def check_source() -> None:
        if _stamps(look()) != _stamps(listing):
            raise CheckpointError(
                f"`{source}` changed while it was converted", hint="convert it again"
            )

    made = assemble(
        recipe,
        weights,
        copies=copies,
        files=files_to_write,
        check_source=check_source,
        progress=progress,
    )
    return _result(
        origin.name or str(source),
        recipe,
        made.manifest,
        started,
        write_s=made.write_s,
        verify_s=made.verify_s,
        resumed=made.resumed,
        warnings=(*warnings, *(cast.warnings() if cast else ())),
    )


def _open_weights(listing: Listing) -> Weights:
    if listing.kind == "torch":
        from sllmctl.core.write.torch_files import open_torch_files

        return open_torch_files(listing)
    if listing.kind == "sllm-store":
        return open_sllm_store_files(listing)
    return open_safetensors(listing)


def check_places(source: Path, target: Path) -> None:
    """Refuse a target that is the source, or in it, or around it."""
    inside, outside = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if inside == outside:
        raise ConfigError(
            f"source and output are the same directory, `{target}`",
            hint="choose another place with --output",
        )
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        inner, outer = (source, target) if inside.is_relative_to(outside) else (target, source)
        raise ConfigError(
            f"`{inner}` is inside `{outer}`: source and output must lie apart",
            hint="choose another place with --output",
        )


def _stamps(listing: Listing) -> dict[str, list[int]]:
    return dict(source_stamps(listing, with_times=True))


def _single_name(listing: Listing) -> str:
    names = {file.name for file in listing.others}
    # What PEFT looks for beside an adapter's configuration.
    return ADAPTER_NAME if ADAPTER_CONFIG in names and _CONFIG_NAME not in names else SINGLE_NAME


def _fingerprint(
    listing: Listing, origin: Origin, dtype: str, max_shard_bytes: int, file_format: Format
) -> str:
    """Identify a conversion by what it reads and what it makes of it."""
    # A commit says what the files hold; the times of a cache's copies say nothing.
    pinned = origin.hub is not None and bool(_COMMIT.fullmatch(origin.revision or ""))
    document = {
        "layout": _LAYOUT_VERSION,
        "hub": [origin.hub, origin.name, origin.revision],
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
        "files": source_stamps(listing, with_times=not pinned),
    }
    if file_format != "safetensors":
        document["format"] = file_format
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())


def _find_same(recipe: Recipe) -> Manifest | None:
    """The manifest of the target, if it is what this conversion would make."""
    try:
        manifest = read_manifest(recipe.target)
        if manifest is None or manifest.fingerprint != recipe.fingerprint:
            return None
        sizes = {shard.path.name: shard.size for shard in open_checkpoint(recipe.target).shards}
    except CheckpointError:
        return None
    return manifest if sizes == {shard.name: shard.size for shard in manifest.shards} else None


def _read_config(listing: Listing) -> dict[str, Any]:
    """The model's configuration; empty if the source has none."""
    for file in listing.others:
        if file.name == _CONFIG_NAME:
            try:
                config = json.loads(read_file(file.path))
            except (ValueError, RecursionError) as exc:
                raise CheckpointError(f"cannot read `{file.path}`: {exc}") from exc
            if isinstance(config, dict):
                return config
            raise CheckpointError(f"`{file.path}` is not a JSON object")
    return {}


def _result(
    source: str,
    recipe: Recipe,
    manifest: Manifest,
    started: float,
    *,
    already: bool = False,
    resumed: int = 0,
    write_s: float = 0.0,
    verify_s: float = 0.0,
    warnings: tuple[str, ...] = (),
) -> ConvertResult:
    return ConvertResult(
        source=source,
        path=recipe.target,
        tensors=manifest.tensors,
        bytes=manifest.bytes,
        shards=len(manifest.shards),
        elapsed_s=time.perf_counter() - started,
        write_s=write_s,
        verify_s=verify_s,
        already=already,
        resumed=resumed,
        warnings=warnings,
    )

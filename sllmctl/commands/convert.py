"""`sllmctl convert`: download if need be, convert, verify."""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllmctl.commands.options import AsJson, StoragePath, quiet_option
from sllmctl.console import Console
from sllmctl.core.units import format_count, format_rate, format_seconds, format_size, parse_size

if TYPE_CHECKING:
    from pathlib import Path

    from sllmctl.core.write.convert import ConvertResult


class Dtype(str, Enum):
    """What weights become."""

    KEEP = "keep"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Format(str, Enum):
    """How weights are stored."""

    SAFETENSORS = "safetensors"
    SLLM_STORE = "sllm-store"


class Engine(str, Enum):
    """Whose rank state to write."""

    VLLM = "vllm"


_OURS = {
    "model": "the checkpoint",
    "tensor_parallel_size": "what --tensor-parallel-size says",
    "load_format": "sllm here",
    "model_loader_extra_config": "sllmctl's own here",
}
"""Arguments of an engine that are no business of --engine-args."""


class Hub(str, Enum):
    """Where a model's name is looked up."""

    AUTO = "auto"
    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A model's name on a hub, or a local directory."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIRECTORY",
            help="Directory to write. [default: the model's name below the storage path]",
            show_default=False,
        ),
    ] = None,
    storage_path: StoragePath = None,
    dtype: Annotated[
        Dtype,
        typer.Option("--dtype", help="Cast weights of the model's main floating dtype."),
    ] = Dtype.KEEP,
    format_: Annotated[
        Format,
        typer.Option("--format", help="Weight format to write; sllm-store is for its server."),
    ] = Format.SAFETENSORS,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest weight file.")
    ] = "16GiB",
    hub: Annotated[
        Hub,
        typer.Option(
            "--hub",
            help="Hub to download from. [default: $SLLMCTL_HUB, auto]",
            show_default=False,
        ),
    ] = Hub.AUTO,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch, tag or commit to download.", show_default=False),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="PATTERN",
            help="Use only files that match, of any weight format. Repeatable.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="PATTERN",
            help="Leave out files that match. Repeatable.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(
            "--engine",
            help="Also start this engine once and save what each rank holds: its rank state.",
            show_default=False,
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel-size",
            metavar="N",
            min=1,
            help="With --engine: number of ranks. [default: 1]",
            show_default=False,
        ),
    ] = None,
    engine_args: Annotated[
        str | None,
        typer.Option(
            "--engine-args",
            metavar="JSON",
            help="With --engine: the other arguments that it will serve with.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Do not read back and compare what was written."),
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, quiet_option("the path")] = False,
) -> None:
    """Convert a model for fast loading, and verify the result.

    A model named by its hub name is downloaded first.

    Examples:

      sllmctl convert Qwen/Qwen3-8B

      sllmctl convert ./my-finetune --dtype bfloat16 --output ./my-bf16
    """
    from sllmctl import api

    console = Console.choose(as_json=as_json, quiet=quiet)
    arguments = _engine_arguments(engine, tensor_parallel_size, engine_args)
    with console.progress() as progress:
        result = api.run_conversion(
            source,
            output,
            storage_path=storage_path,
            hub=hub.value,
            revision=revision,
            dtype=dtype.value,
            format=format_.value,
            max_shard_bytes=parse_size(max_shard_size),
            include=include or (),
            exclude=exclude or (),
            force=force,
            verify=not no_verify,
            progress=progress,
        )
    for warning in result.warnings:
        console.warn(warning)
    states: list[Path] = []
    lines = _lines(result)
    if engine is not None:
        from sllmctl.integrations.vllm_rank import describe_states, write_rank_states

        states = write_rank_states(
            result.path,
            tensor_parallel_size=tensor_parallel_size or 1,
            engine_args=arguments,
            verified=not no_verify and not result.already,
        )
        lines += [f"  {describe_states(states)}", f"  {states[0].parent}"]
    console.result(_document(result, states), quiet=result.path, human=lines)


def _engine_arguments(
    engine: Engine | None, tensor_parallel_size: int | None, text: str | None
) -> dict[str, Any]:
    """Read the engine's arguments, and see that it is here, before anything is converted."""
    if engine is None:
        for option, given in (
            ("--tensor-parallel-size", tensor_parallel_size),
            ("--engine-args", text),
        ):
            if given is not None:
                raise typer.BadParameter("needs --engine", param_hint=option)
        return {}
    try:
        arguments = json.loads(text or "{}")
    except ValueError as exc:
        raise typer.BadParameter(f"not JSON: {exc}", param_hint="--engine-args") from exc
    if not isinstance(arguments, dict):
        raise typer.BadParameter("not a JSON object", param_hint="--engine-args")
    for key, instead in _OURS.items():
        if key in arguments:
            raise typer.BadParameter(f"`{key}` is {instead}", param_hint="--engine-args")
    from sllmctl.integrations.vllm_rank import require_vllm

    require_vllm()
    return arguments


def _document(result: ConvertResult, rank_states: list[Path]) -> dict[str, Any]:
    return {
        "schema": "sllmctl.convert/1",
        "source": result.source,
        "path": str(result.path),
        "tensors": result.tensors,
        "bytes": result.bytes,
        "shards": result.shards,
        "elapsed_s": result.elapsed_s,
        "gb_per_s": _moved(result) / result.elapsed_s / 1e9 if result.elapsed_s else 0.0,
        "stages": {"write_s": result.write_s, "verify_s": result.verify_s},
        "already": result.already,
        "resumed_shards": result.resumed,
        "warnings": list(result.warnings),
        "rank_states": list(map(str, rank_states)),
    }


def _moved(result: ConvertResult) -> int:
    return 0 if result.already else result.bytes


def _lines(result: ConvertResult) -> list[str]:
    size = (
        f"{format_count(result.tensors, 'tensor')}, {format_size(result.bytes)} in "
        f"{format_count(result.shards, 'shard')}"
    )
    if result.already:
        return [
            f"{result.source} is there already, from the same source with the same options: {size}",
            f"  {result.path}",
        ]
    lines = [
        f"converted {result.source}: {size}, {format_seconds(result.elapsed_s)}"
        f" - {format_rate(result.bytes, result.elapsed_s)}",
        f"  {result.path}",
    ]
    if result.resumed:
        lines.append(f"  {result.resumed} shards were kept from a conversion that was killed")
    if result.verify_s:
        lines.append(f"  read back and compared in {format_seconds(result.verify_s)}")
    return lines

"""`sllmctl ls`: what is in the storage path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from sllmctl.commands.options import AsJson, Socket, StoragePath, quiet_option
from sllmctl.console import Console
from sllmctl.core.units import format_size
from sllmctl.errors import CheckpointError, StoreError


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    path: Path
    nbytes: int
    tensors: int
    dtypes: dict[str, int]  # bytes by element type, most first
    format: str | None
    converted: bool
    problem: str | None
    warm_bytes: int = 0  # in the store, headers included

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self.path),
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "dtypes": list(self.dtypes),
            "format": self.format,
            "converted": self.converted,
            "problem": self.problem,
            "warm_bytes": self.warm_bytes,
        }

    def cells(self) -> list[str]:
        if self.problem is not None:
            return [self.name, "", "", "", "", f"damaged: {self.problem}"]
        dtypes = ", ".join(self.dtypes)
        state = "converted" if self.converted else "as downloaded"
        if self.format == "sllm-store":
            state = "for sllm-store" if self.converted else "by sllm-store"
        warm = f"{min(1.0, self.warm_bytes / self.nbytes):.0%}" if self.warm_bytes else ""
        return [self.name, format_size(self.nbytes), f"{self.tensors:,}", warm, dtypes, state]


def ls(
    storage_path: StoragePath = None,
    socket: Socket = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, quiet_option("the names")] = False,
) -> None:
    """List the checkpoints in the storage path.

    Shows size, tensors, the part that is warm, element types and state.

    Examples:

      sllmctl ls

      sllmctl ls --storage-path /data/models --json
    """
    from sllmctl.core.config import find_models
    from sllmctl.core.config import storage_path as choose_storage_path

    console = Console.choose(as_json=as_json, quiet=quiet)
    storage = choose_storage_path(storage_path)
    warm = _warm_bytes(socket)
    rows = [_look(name, path, warm.get(name, 0)) for name, path in find_models(storage)]
    total = sum(row.nbytes for row in rows)
    human = [f"no checkpoint in {storage}: `sllmctl convert ORG/NAME` puts one there"]
    if rows:
        human = [
            *console.table(
                ["name", ">size", ">tensors", ">warm", "dtypes", "state"],
                [row.cells() for row in rows],
            ),
            "",
            f"{len(rows)} in {storage}, {format_size(total)}",
        ]
    console.result(
        {
            "schema": "sllmctl.ls/1",
            "storage_path": str(storage),
            "models": [row.document() for row in rows],
        },
        quiet="\n".join(row.name for row in rows),
        human=human,
    )


def _warm_bytes(socket: Path | None) -> dict[str, int]:
    """What a store holds of each model, by name; nothing where none answers."""
    from sllmctl.store.client import StoreClient

    try:
        with StoreClient(socket) as client:
            models = client.ask({"op": "status"})["models"]
    except StoreError:
        return {}
    return {model["name"]: model["warm_bytes"] for model in models}


def _look(name: str, path: Path, warm_bytes: int) -> _Row:
    from sllmctl.core.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as exc:
        return _Row(name, path, 0, 0, {}, None, False, str(exc))
    dtypes: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.nbytes
    by_size = dict(sorted(dtypes.items(), key=lambda item: -item[1]))
    count = len(checkpoint.tensors) + len(checkpoint.aliases)
    return _Row(
        name,
        path,
        checkpoint.nbytes,
        count,
        by_size,
        checkpoint.format,
        checkpoint.manifest is not None,
        None,
        warm_bytes,
    )

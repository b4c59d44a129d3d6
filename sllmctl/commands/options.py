"""Options that several commands share, so that each reads the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

StoragePath = Annotated[
    Path | None,
    typer.Option(
        "--storage-path",
        file_okay=False,
        help="Directory that holds checkpoints as ORG/NAME. "
        "[default: $SLLMCTL_STORAGE_PATH, $STORAGE_PATH, ./models]",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        help="Reader threads, 1 to 64. [default: $SLLMCTL_THREADS, 16, to a device 8]",
        show_default=False,
    ),
]
ChunkSize = Annotated[
    str | None,
    typer.Option(
        "--chunk-size",
        metavar="SIZE",
        help="Largest single read. [default: $SLLMCTL_CHUNK_SIZE, 8MiB, into the page cache 2MiB]",
        show_default=False,
    ),
]
Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        help="Socket of the store. [default: $SLLMCTL_SOCKET, $XDG_RUNTIME_DIR/sllmctl/store.sock, "
        "/run/sllmctl/store.sock]",
        show_default=False,
    ),
]


def quiet_option(value: str) -> Any:
    """`--quiet`, for a command that prints this one value then."""
    return typer.Option("--quiet", "-q", help=f"Print only {value}.")

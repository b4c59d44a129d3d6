"""Options that several commands share, so that each reads the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StoragePath = Annotated[
    Path | None,
    typer.Option(
        "--storage-path",
        help="Where checkpoints live, as ORG/NAME. "
        "[default: $SLLMCTL_STORAGE_PATH, $STORAGE_PATH, ./models]",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Write one value only.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Reader threads, 1 to 64.", show_default=False),
]
ChunkSize = Annotated[
    str | None,
    typer.Option(
        "--chunk-size", help="Largest read, such as 16MiB.", show_default=False, metavar="SIZE"
    ),
]
Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        help="The store's socket. [default: $SLLMCTL_SOCKET, $XDG_RUNTIME_DIR/sllmctl/store.sock, "
        "/run/sllmctl/store.sock]",
        show_default=False,
    ),
]

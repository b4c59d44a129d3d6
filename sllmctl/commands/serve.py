"""`sllmctl serve`: the store."""

from __future__ import annotations

import grp
import json
import logging
import os
import socket as sockets
from datetime import datetime, timezone
from typing import Annotated

import typer

from sllmctl.commands.options import Socket, StoragePath
from sllmctl.core.units import format_page_size, format_size, parse_share, parse_size
from sllmctl.errors import ConfigError

log = logging.getLogger(__name__)
DEFAULT_FRACTION = 0.25


def serve(
    mem_pool_size: Annotated[
        str | None,
        typer.Option(
            "--mem-pool-size",
            envvar="SLLMCTL_MEM_POOL_SIZE",
            metavar="SIZE",
            help="Memory for checkpoints: 4GB, 64GiB, or 50% of what is free. [default: 25%]",
            show_default=False,
        ),
    ] = None,
    storage_path: StoragePath = None,
    socket: Socket = None,
    segment_size: Annotated[
        str | None,
        typer.Option(
            "--segment-size",
            metavar="SIZE",
            help="Unit in which the pool is divided. [default: 2MiB to 256MiB, by pool size]",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            "--group",
            metavar="GROUP",
            help="Let members of this group (name or number) use the store.",
            show_default=False,
        ),
    ] = None,
    preload: Annotated[
        list[str] | None,
        typer.Option("--preload", metavar="NAME", help="Warm this model at startup. Repeatable."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="HOST:PORT",
            help="Serve Prometheus metrics and /healthz here, such as 127.0.0.1:9464.",
            show_default=False,
        ),
    ] = None,
    io_threads: Annotated[
        int | None,
        typer.Option(
            "--io-threads",
            "--threads",
            min=1,
            max=64,
            help="Reader threads for bringing in one model.",
            show_default=False,
        ),
    ] = None,
    json_logs: Annotated[
        bool, typer.Option("--json-logs", help="Log JSON to stderr, one object per line.")
    ] = False,
) -> None:
    """Keep checkpoints warm in memory for all processes here.

    Runs in the foreground until SIGTERM or Ctrl-C.

    Examples:

      sllmctl serve --mem-pool-size 4GB

      sllmctl serve --mem-pool-size 50% --preload Qwen/Qwen3-8B
    """
    from sllmctl.core.config import find_models
    from sllmctl.core.config import storage_path as choose_storage_path
    from sllmctl.core.host import available_memory_bytes
    from sllmctl.store.backing import may_lock
    from sllmctl.store.daemon import Daemon
    from sllmctl.store.pool import choose_segment_bytes
    from sllmctl.store.protocol import server_socket
    from sllmctl.store.service import Settings

    if json_logs:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_JsonFormatter())
    available = available_memory_bytes()
    pool_bytes = _pool_bytes(mem_pool_size, available)
    if pool_bytes > available:
        raise ConfigError(
            f"a pool of {format_size(pool_bytes)} is more than the {format_size(available)} that "
            "are free on this machine and in its container",
            hint="use a smaller --mem-pool-size, such as 50%",
        )
    settings = Settings(
        storage=choose_storage_path(storage_path),
        socket_path=server_socket(socket),
        pool_bytes=pool_bytes,
        segment_bytes=parse_size(segment_size)
        if segment_size
        else choose_segment_bytes(pool_bytes),
        group=_group_id(group),
        preload=preload or (),
        threads=io_threads or 0,
        metrics=metrics,
    )
    daemon = Daemon(settings)

    def ready() -> None:
        pool = daemon.keeper.pool
        names = [name for name, _ in find_models(settings.storage)]
        chosen = "" if mem_pool_size else ", a quarter of what is free"
        models = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        backing = pool.backing
        locked = "locked" if may_lock(pool.bytes) else "not locked: `ulimit -l` is smaller"
        for line in (
            f"socket   {settings.socket_path}",
            f"pool     {format_size(pool.bytes)} in {pool.capacity} segments of "
            f"{format_size(pool.segment_bytes)}{chosen}",
            f"memory   {format_page_size(backing.page_bytes)} pages in a {backing.kind}, {locked}",
            f"models   {len(names)} in {settings.storage}{': ' if names else ''}{models}",
            "ready; Ctrl-C ends",
        ):
            print(line, flush=True)
        _notify_systemd()

    daemon.run(ready)


class _JsonFormatter(logging.Formatter):
    """A log record as one JSON object: what collectors of logs read."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False)


def _pool_bytes(text: str | None, available: int) -> int:
    return int(available * DEFAULT_FRACTION) if text is None else parse_share(text, available)


def _group_id(name: str | None) -> int | None:
    if name is None:
        return None
    if name.isdecimal():  # a container often has no name for it
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as exc:
        raise ConfigError(f"there is no group `{name}`") from exc


def _notify_systemd() -> None:
    """Say READY=1 to whoever started us. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        path = "\0" + address[1:] if address.startswith("@") else address
        try:
            with sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM) as sock:
                sock.connect(path)
                sock.sendall(b"READY=1")
        except OSError as exc:  # clients are served all the same
            log.warning("cannot say READY=1 at `%s`: %s", address, exc.strerror or exc)

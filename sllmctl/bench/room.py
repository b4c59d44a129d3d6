"""Room for what a run writes and loads, asked for before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from sllmctl.core.host import available_memory_bytes
from sllmctl.core.units import format_size
from sllmctl.errors import ConfigError

_SPARE_BYTES = 256 * 2**20


def check_room(directory: Path, needed_bytes: int) -> None:
    """Refuse to write more than the disk has room for.

    Raises:
        ConfigError: It has not.
    """
    free = free_bytes(directory)
    if free < needed_bytes:
        raise ConfigError(
            f"the benchmark needs {format_size(needed_bytes)} on the disk of "
            f"`{directory.parent}`, and {format_size(free)} are free",
            hint="use a smaller --size, or another --storage-path",
        )


def free_bytes(directory: Path) -> int:
    """What can be written to a directory's disk, with something left for others."""
    return max(0, shutil.disk_usage(directory).free - _SPARE_BYTES)


def spare_memory_bytes() -> int:
    """Memory that a run may take, with something left for others."""
    return max(0, available_memory_bytes() - 2 * _SPARE_BYTES)

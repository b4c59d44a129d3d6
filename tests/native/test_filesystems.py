"""The programs that read, on every filesystem that this machine can make."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from sllmctl import native
from tests.native.build import run_program

PROGRAMS = ("read", "residency", "job", "memory")
IMAGE_BYTES = 320 * 2**20  # sparse; xfs wants 300 MiB
MAKERS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "ext4-1k": ["mkfs.ext4", "-q", "-F", "-b", "1024"],
    "ext2": ["mkfs.ext4", "-q", "-F", "-t", "ext2"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


def mount(*arguments: str) -> None:
    """Mount, or skip with what mount said."""
    done = subprocess.run(
        ["mount", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mount {' '.join(arguments[:2])}: {done.stderr.strip()}")


@contextmanager
def mounted(point: Path, *arguments: str) -> Iterator[Path]:
    point.mkdir()
    mount(*arguments, str(point))
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], timeout=60, check=True)


@contextmanager
def image(kind: str, directory: Path) -> Iterator[Path]:
    """A new filesystem in a file."""
    if shutil.which(MAKERS[kind][0]) is None:
        pytest.skip(f"there is no {MAKERS[kind][0]}")
    path = directory / "image"
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run([*MAKERS[kind], str(path)], timeout=60, check=True, capture_output=True)
    with mounted(directory / "mount", "-o", "loop", str(path)) as point:
        yield point


@contextmanager
def tmpfs(_: str, directory: Path) -> Iterator[Path]:
    with mounted(directory / "mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs") as point:
        yield point


@contextmanager
def overlay(_: str, directory: Path) -> Iterator[Path]:
    for name in ("lower", "upper", "work"):
        (directory / name).mkdir(exist_ok=True)
    layers = ",".join(f"{name}dir={directory / name}" for name in ("lower", "upper", "work"))
    with mounted(directory / "mount", "-t", "overlay", "-o", layers, "overlay") as point:
        yield point


FILESYSTEMS: dict[str, Callable[[str, Path], AbstractContextManager[Path]]] = {
    **dict.fromkeys(MAKERS, image),
    "tmpfs": tmpfs,
    "overlay": overlay,
}


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@needs_root
@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_every_check_holds_on_a_filesystem(kind: str, tmp_path: Path) -> None:
    with FILESYSTEMS[kind](kind, tmp_path) as point:
        for program in PROGRAMS:
            directory = point / program
            directory.mkdir()
            run_program(Path(__file__).with_name(f"test_{program}.c"), "plain", directory)


@needs_root
def test_a_file_of_a_lower_layer_is_known_by_its_own_pages(tmp_path: Path) -> None:
    """As every file of a container's image is."""
    lower = tmp_path / "lower" / "shard"
    lower.parent.mkdir()
    data = os.urandom(2**20) * 6
    lower.write_bytes(data)
    with overlay("", tmp_path) as point:
        fd = os.open(point / "shard", os.O_RDONLY)
        below = os.open(lower, os.O_RDONLY)
        try:
            os.fsync(below)
            os.posix_fadvise(below, 0, 0, os.POSIX_FADV_DONTNEED)
            cold = native.probe_file(fd, "shard", 0, len(data))
            memory = native.Memory.create(len(data))
            extents = [native.Extent(0, 0, len(data), memory.address)]
            with native.Job([(fd, "shard")], extents, keep=memory) as job:
                while not job.wait()[0]:
                    pass
            os.pread(fd, len(data), 0)
            warm = native.probe_file(fd, "shard", 0, len(data))
        finally:
            os.close(fd)
            os.close(below)
    assert bytes(memory.buffer) == data
    assert (cold.residency_known, cold.resident_bytes) == (True, 0)
    assert (warm.residency_known, warm.resident_bytes) == (True, len(data))
    assert warm.local

"""A cold load reads every byte from the disk once, by the kernel's own count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 2**20
FILE_BYTES = 96 * MIB + 12345
SLACK_BYTES = FILE_BYTES // 100

# A process of its own, so that nobody else's reads are counted. As a stranger it owns nothing and
# may write nothing, so that neither cachestat nor mincore answers.
SCRIPT = """
import ctypes, json, os, sys
from sllmctl import native

path, direct, stranger = sys.argv[1], sys.argv[2] == "True", sys.argv[3] == "True"
fd = os.open(path, os.O_RDONLY)
if stranger:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
size = os.fstat(fd).st_size

def bytes_from_disk():
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["read_bytes"])

before = bytes_from_disk()
facts = native.probe_file(fd, path, 0, size)
probed = bytes_from_disk() - before
memory = native.Memory.create(size)
with native.Job(
    [(fd, path)], [native.Extent(0, 0, size, memory.address)], keep=memory, direct=direct
) as job:
    done = False
    while not done:
        done, progress = job.wait()
print(json.dumps({
    "probed": probed, "read": bytes_from_disk() - before, "disk": progress.bytes_disk,
    "cache": progress.bytes_cache, "resident": facts.resident_bytes,
    "known": facts.residency_known, "sum": sum(memoryview(memory.buffer)[0:size:4097]),
}))
"""


def load(path: Path, *, direct: bool = True, stranger: bool = False) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(direct), str(stranger)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


def put_out_of_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def bring_into_cache(path: Path, start: int, end: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead past the end
    for offset in range(start, end, MIB):
        os.pread(fd, min(MIB, end - offset), offset)
    os.close(fd)


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of about 96 MiB that the disk has, and the page cache does not."""
    path = tmp_path_factory.mktemp("disk") / "big"
    block = os.urandom(MIB)
    with path.open("wb") as file:
        for number in range(FILE_BYTES // MIB):
            file.write(number.to_bytes(8, "little") + block[8:])
        file.write(block[: FILE_BYTES % MIB])
    path.chmod(0o444)
    put_out_of_cache(path)
    cold = load(path)
    if cold["resident"] or cold["read"] < FILE_BYTES // 2:
        pytest.skip("the temporary directory is not on a disk whose pages can be dropped")
    yield path
    path.unlink()


@pytest.fixture
def cold_file(big_file: Path) -> Path:
    put_out_of_cache(big_file)
    return big_file


def once(read: int, expected: int) -> bool:
    return abs(read - expected) <= SLACK_BYTES


@pytest.mark.parametrize("direct", [True, False])
def test_a_cold_load_reads_every_byte_once(cold_file: Path, direct: bool) -> None:
    result = load(cold_file, direct=direct)
    assert once(result["read"], FILE_BYTES)
    assert result["probed"] == 0
    assert result["resident"] == 0
    assert result["disk"] + result["cache"] == FILE_BYTES
    # What one thread's read-ahead brings in before another asks counts as found in the cache.
    assert result["disk"] >= FILE_BYTES * (1 if direct else 0.6)


def test_a_direct_load_leaves_the_page_cache_as_it_was(cold_file: Path) -> None:
    load(cold_file)
    assert load(cold_file)["resident"] == 0


def test_a_load_through_the_cache_is_found_there_the_next_time(cold_file: Path) -> None:
    load(cold_file, direct=False)
    result = load(cold_file)
    assert result["read"] <= SLACK_BYTES
    assert (result["disk"], result["cache"]) == (0, FILE_BYTES)


@pytest.mark.parametrize("direct", [True, False])
def test_a_half_resident_file_reads_the_other_half(cold_file: Path, direct: bool) -> None:
    bring_into_cache(cold_file, 0, 48 * MIB)
    result = load(cold_file, direct=direct)
    assert once(result["read"], FILE_BYTES - 48 * MIB)
    assert once(result["disk"], FILE_BYTES - 48 * MIB) or not direct
    assert result["disk"] + result["cache"] == FILE_BYTES


def test_holes_in_what_is_resident_are_read_and_nothing_else(cold_file: Path) -> None:
    for chunk in range(0, 96 * MIB, 32 * MIB):  # every other chunk of the library's own size
        bring_into_cache(cold_file, chunk, chunk + 16 * MIB)
    result = load(cold_file)
    assert once(result["read"], FILE_BYTES - 48 * MIB)
    assert result["disk"] + result["cache"] == FILE_BYTES


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_reader_of_a_foreign_file_reads_every_byte_once_every_time(cold_file: Path) -> None:
    sums = set()
    for _ in range(3):  # looking leaves pages behind: the next look must not take them for a file
        result = load(cold_file, stranger=True)
        # The look itself may bring a page in, and a fast disk has it there before the answer: its
        # chunk then counts as found in the cache, and is found there by the next load too.
        assert FILE_BYTES - result["cache"] <= result["read"] + SLACK_BYTES
        assert result["read"] <= FILE_BYTES + SLACK_BYTES
        assert result["probed"] <= SLACK_BYTES
        assert result["disk"] >= FILE_BYTES * 0.6
        sums.add(result["sum"])
    bring_into_cache(cold_file, 0, FILE_BYTES)
    result = load(cold_file, stranger=True)
    assert result["read"] <= SLACK_BYTES
    assert result["cache"] >= FILE_BYTES * 0.9 or not result["known"]
    assert {result["sum"]} == sums

"""Files that are nearly in the page cache: mapped, and what they lack is brought in first."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sllmctl.core import views
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.load import LoadOptions, LoadStats, load
from sllmctl.native import FileFacts, Memory, probe_file
from tests.conftest import same_bits

MIB = 1 << 20
FILE_MIB = 64


@pytest.fixture
def big(tmp_path: Path, make_cold: Callable[[Path], None]) -> Path:
    """A checkpoint of 64 MiB, all of it in the page cache."""
    rows = torch.arange(FILE_MIB * MIB // 8).view(-1, MIB // 8)
    (tmp_path / "m").mkdir()
    save_file({f"t{i}": part.clone() for i, part in enumerate(rows.chunk(8))}, file_of(tmp_path))
    make_cold(tmp_path / "m")
    if resident(file_of(tmp_path)):
        pytest.skip("this filesystem keeps its files in memory")
    file_of(tmp_path).read_bytes()
    return tmp_path / "m"


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "m" / "model.safetensors"


def resident(path: Path) -> int:
    with path.open("rb") as file:
        return probe_file(file.fileno(), str(path), 0, path.stat().st_size).resident_bytes


def drop(path: Path, start_mib: int, mib: int) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), start_mib * MIB, mib * MIB, os.POSIX_FADV_DONTNEED)


def check(path: Path, **options: object) -> LoadStats:
    """Load, and compare with what safetensors finds, which reads all of the file."""
    stats, loaded = load_and_tell(path, **options)
    want = load_file(path / "model.safetensors")
    assert all(same_bits(loaded[name], tensor) for name, tensor in want.items())
    return stats


def check_alone(path: Path) -> LoadStats:
    """Load, and look at the first and the last element; nobody else reads the file."""
    stats, loaded = load_and_tell(path)
    if "t7" in loaded:
        assert int(loaded["t0"].view(-1)[0]) == 0
        assert int(loaded["t7"].view(-1)[-1]) == FILE_MIB * MIB // 8 - 1
    return stats


def load_and_tell(path: Path, **options: object) -> tuple[LoadStats, dict[str, torch.Tensor]]:
    told: list[tuple[int, int]] = []
    loaded = load(
        open_checkpoint(path),
        LoadOptions(**options),  # type: ignore[arg-type]
        progress=lambda _stage, done, total: told.append((done, total)),
    )
    stats = loaded.stats
    assert stats.disk_bytes + stats.page_cache_bytes == stats.bytes
    assert bool(told) == (stats.read_s > 0)
    assert not told or told[-1][0] == told[-1][1]
    return stats, loaded.tensors


def test_holes_in_a_resident_file_are_brought_in_and_the_file_is_mapped(big: Path) -> None:
    file = big / "model.safetensors"
    drop(file, 8, 4)
    drop(file, 40, 6)
    stats = check(big)
    assert stats.mapped_bytes == stats.page_cache_bytes
    assert stats.mapped_bytes >= (FILE_MIB - 14) * MIB
    assert stats.disk_bytes >= 8 * MIB
    assert resident(file) == file.stat().st_size
    again = check(big)
    assert (again.disk_bytes, again.mapped_bytes, again.read_s) == (0, again.bytes, 0)


def without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that has none; it is asked all the same."""
    monkeypatch.setattr(Memory, "huge_bytes", lambda *_: 0)


def with_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "advise_huge", lambda _: True)
    monkeypatch.setattr(Memory, "huge_bytes", lambda _self, _offset, nbytes: nbytes)


@pytest.mark.parametrize("dropped_mib", [32, FILE_MIB + 1])
def test_where_there_are_no_huge_pages_what_is_missing_is_read_around_the_cache(
    big: Path, monkeypatch: pytest.MonkeyPatch, dropped_mib: int
) -> None:
    without_huge_pages(monkeypatch)
    file = big / "model.safetensors"
    drop(file, 0, dropped_mib)
    stats = check_alone(big)
    assert stats.mapped_bytes == 0
    assert stats.disk_bytes >= min(dropped_mib, FILE_MIB) * MIB - 8 * MIB
    # The attempt brought in a piece, and the kernel perhaps one more.
    assert resident(file) <= (FILE_MIB - min(dropped_mib, FILE_MIB) + 6) * MIB


@pytest.mark.parametrize("dropped_mib", [32, FILE_MIB + 1])
def test_where_there_are_huge_pages_the_disk_writes_into_them_and_the_file_is_mapped(
    big: Path, monkeypatch: pytest.MonkeyPatch, dropped_mib: int
) -> None:
    with_huge_pages(monkeypatch)
    file = big / "model.safetensors"
    drop(file, 0, dropped_mib)
    stats = check_alone(big)
    assert stats.mapped_bytes + stats.disk_bytes == stats.bytes
    assert abs(stats.disk_bytes - min(dropped_mib, FILE_MIB) * MIB) <= 2 * MIB
    assert resident(file) == file.stat().st_size


def test_a_look_at_the_filesystem_finds_what_the_kernel_says_of_the_mapping(big: Path) -> None:
    drop(big / "model.safetensors", 0, FILE_MIB + 1)
    loaded = load(open_checkpoint(big), LoadOptions())
    address = loaded.tensors["t0"].data_ptr()
    huge_kib = 0
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            here = start <= address < end
        elif here and line.startswith("FilePmdMapped:"):
            huge_kib = int(line.split()[1])
    mapped = loaded.stats.disk_bytes and resident(big / "model.safetensors") > FILE_MIB // 2 * MIB
    assert (huge_kib * 1024 > FILE_MIB // 2 * MIB) == bool(mapped)


def test_a_small_file_is_not_worth_a_look(
    tmp_path: Path, make_cold: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_huge_pages(monkeypatch)
    (tmp_path / "m").mkdir()
    save_file({"t": torch.zeros(4 * MIB)}, file_of(tmp_path))
    make_cold(tmp_path / "m")
    if resident(file_of(tmp_path)):
        pytest.skip("this filesystem keeps its files in memory")
    assert check_alone(tmp_path / "m").mapped_bytes == 0
    assert resident(file_of(tmp_path)) == 0


def test_files_that_would_push_each_other_out_of_memory_are_not_brought_in(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_huge_pages(monkeypatch)
    drop(big / "model.safetensors", 0, 32)
    monkeypatch.setattr(views, "available_memory_bytes", lambda: FILE_MIB * MIB)
    assert check(big).mapped_bytes == 0


@pytest.mark.parametrize("options", [{"map_files": "never"}, {"map_files": "always"}])
def test_what_nobody_asked_for_is_not_brought_in(big: Path, options: dict[str, str]) -> None:
    drop(big / "model.safetensors", 8, 4)
    assert (check(big, **options).read_s > 0) == (options["map_files"] == "never")


def test_holes_for_which_there_is_no_memory_are_not_brought_in(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(big / "model.safetensors", 8, 8)
    monkeypatch.setattr(views, "available_memory_bytes", lambda: 4 * MIB)
    assert check(big).mapped_bytes == 0


@given(st.integers(0, 9 * MIB), st.integers(1, 40 * MIB))
def test_pieces_cover_what_is_missing_and_none_is_larger_than_its_place(
    start: int, nbytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "probe_file", lambda *_: FileFacts(0, 0, True, True))
        pieces = list(views._holes(0, "f", start, start + nbytes))
    assert [at for at, _ in pieces[1:]] == [at + length for at, length in pieces[:-1]]
    assert (pieces[0][0], sum(length for _, length in pieces)) == (start, nbytes)
    assert max(length for _, length in pieces) <= 2 * MIB

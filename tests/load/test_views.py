"""Files that are nearly in the page cache: mapped, and what they lack is brought in first."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sllmctl.core import views
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.load import LoadOptions, LoadStats, load, open_shard
from sllmctl.core.views import Part, View
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
    assert told == sorted(told)
    assert len({total for _, total in told}) <= 1
    return stats, loaded.tensors


def test_holes_in_a_resident_file_are_brought_in_and_the_file_is_mapped(big: Path) -> None:
    file = big / "model.safetensors"
    drop(file, 8, 4)
    drop(file, 40, 6)
    stats = check(big)
    assert stats.mapped_bytes == stats.bytes
    assert stats.brought_in_bytes == stats.disk_bytes <= 14 * MIB
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
    before = resident(file)
    for _ in range(3):
        stats = check_alone(big)
        assert stats.mapped_bytes == 0
        assert stats.disk_bytes >= min(dropped_mib, FILE_MIB) * MIB - 8 * MIB
    # What the look for huge pages read in vain does not stay.
    assert resident(file) <= before + 4 * MIB


def test_a_kernel_that_does_not_tell_is_not_asked_by_a_read(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "huge_bytes", lambda *_: None)
    file = big / "model.safetensors"
    drop(file, 0, FILE_MIB + 1)
    assert views_of(big) == [None]
    assert resident(file) == 0


@pytest.mark.parametrize("dropped_mib", [32, FILE_MIB + 1])
def test_where_there_are_huge_pages_the_disk_writes_into_them_and_the_file_is_mapped(
    big: Path, monkeypatch: pytest.MonkeyPatch, dropped_mib: int
) -> None:
    with_huge_pages(monkeypatch)
    file = big / "model.safetensors"
    drop(file, 0, dropped_mib)
    stats = check_alone(big)
    assert stats.mapped_bytes == stats.bytes
    assert stats.brought_in_bytes == stats.disk_bytes
    assert abs(stats.disk_bytes - min(dropped_mib, FILE_MIB) * MIB) <= 2 * MIB
    assert resident(file) == file.stat().st_size


def pmd_mapped_bytes(address: int) -> int:
    """What the kernel says of the mapping at an address. Source: proc(5), smaps."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            here = start <= address < end
        elif here and line.startswith("FilePmdMapped:"):
            return int(line.split()[1]) * 1024
    return 0


def kernel_gives_huge_pages(file: Path) -> bool:
    """Ask without the library: a cold file, mapped and populated. It is cold again afterwards."""
    nbytes = file.stat().st_size
    with file.open("rb") as opened:
        drop(file, 0, FILE_MIB + 1)
        view = Memory.map_file(opened.fileno(), str(file), 0, nbytes)
    libc = ctypes.CDLL(None, use_errno=True)
    for advice in (14, 22):  # MADV_HUGEPAGE, MADV_POPULATE_READ
        libc.madvise(ctypes.c_void_p(view.address), ctypes.c_size_t(nbytes), advice)
    huge = pmd_mapped_bytes(view.address)
    del view
    drop(file, 0, FILE_MIB + 1)
    return huge >= 2 * MIB


def views_of(path: Path) -> list[View | None]:
    checkpoint = open_checkpoint(path)
    with ExitStack() as stack:
        fds = [open_shard(shard, stack) for shard in checkpoint.shards]
        return views.map_shards(checkpoint.shards, fds, LoadOptions())


def read_in_small_pages(file: Path, nbytes: int) -> None:
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, nbytes, 64 << 10):
            os.pread(opened.fileno(), 4096, offset)
            os.pread(opened.fileno(), 64 << 10, offset)


def read_one_page(file: Path, _: int) -> None:
    """In the first piece that is looked at: it can be no huge page any more."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(opened.fileno(), 4096, 2 * MIB)


def read_in_huge_pages(file: Path, nbytes: int) -> None:
    (view,) = views_of(file.parent)
    if view is not None:
        with file.open("rb") as opened:
            part = Part(replace(view, fd=opened.fileno()), 2 * MIB, nbytes - 2 * MIB, 0)
            views.bring_in([part], LoadOptions())


@pytest.mark.parametrize("before", [None, read_one_page, read_in_small_pages, read_in_huge_pages])
def test_huge_pages_are_found_where_the_kernel_gives_them_whatever_others_read_before(
    big: Path, before: Callable[[Path, int], None] | None
) -> None:
    file = big / "model.safetensors"
    gives = kernel_gives_huge_pages(file)
    if before is not None:
        before(file, 24 * MIB)
    (view,) = views_of(big)
    assert (view is not None) == gives
    assert resident(file) <= (24 + 16) * MIB


def test_shards_that_are_read_and_shards_that_are_brought_in_share_a_progress_and_a_total(
    tmp_path: Path, make_cold: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_huge_pages(monkeypatch)
    path = tmp_path / "m"
    path.mkdir()
    for number in (1, 2):
        rows = torch.arange(8 * MIB) + number
        save_file({f"t{number}": rows}, path / f"model-0000{number}-of-00002.safetensors")
    make_cold(path)
    if resident(path / "model-00001-of-00002.safetensors"):
        pytest.skip("this filesystem keeps its files in memory")
    mostly = path / "model-00001-of-00002.safetensors"
    mostly.read_bytes()
    drop(mostly, 8, 4)
    stats, _ = load_and_tell(path)
    assert 0 < stats.brought_in_bytes <= 6 * MIB
    assert stats.disk_bytes >= 64 * MIB


@pytest.mark.parametrize("turns", [1, 3, 7])
def test_processes_that_read_ahead_by_turns_read_all_of_a_file(big: Path, turns: int) -> None:
    file = big / "model.safetensors"
    drop(file, 0, FILE_MIB + 1)
    (shard,) = open_checkpoint(big).shards
    with ExitStack() as stack:
        fd = open_shard(shard, stack)
        for turn in range(turns):
            views.read_ahead(shard, fd, LoadOptions("always"), turn, turns)
    assert resident(file) == file.stat().st_size


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
    monkeypatch.setattr(views, "available_memory_bytes", lambda **_: 20 * MIB)
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

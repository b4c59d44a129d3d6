"""Files are put into the page cache in one way, however they came there before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sllmctl.bench.pagecache import PageCache
from sllmctl.native import probe_file


def resident(path: Path) -> int:
    with path.open("rb") as file:
        return int(probe_file(file.fileno(), str(path), 0, path.stat().st_size).resident_bytes)


def test_what_others_brought_in_is_read_anew_and_what_we_did_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 << 20))
    put_out: list[int] = []
    advise = os.posix_fadvise

    def counted(*args: int) -> None:
        put_out.append(resident(path))
        advise(*args)

    monkeypatch.setattr(os, "posix_fadvise", counted)
    cache = PageCache()
    cache.make_hot([path])  # from where its writer left it
    assert put_out == [8 << 20]
    cache.make_hot([path])
    assert len(put_out) == 1
    cache.make_cold([path])
    assert resident(path) == 0
    path.read_bytes()
    put_out.clear()
    cache.make_hot([path])
    assert put_out == [8 << 20]
    assert resident(path) == 8 << 20

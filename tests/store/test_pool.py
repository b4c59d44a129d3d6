"""The pool's arithmetic, and who has to go for a newcomer."""

from __future__ import annotations

import mmap
import os
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllmctl.errors import ConfigError, StoreError
from sllmctl.native import Segment
from sllmctl.store.backing import Backing
from sllmctl.store.pool import Pool, choose_segment_bytes
from sllmctl.store.residency import Lease, StoredModel, choose_victims

MIB = 2**20
SEGMENT = 2 * MIB
CAP_SYS_NICE = 23


@given(st.integers(min_value=1, max_value=2**45))
def test_segments_are_powers_of_two_within_bounds(pool_bytes: int) -> None:
    size = choose_segment_bytes(pool_bytes)
    assert 2 * MIB <= size <= 256 * MIB
    assert size & (size - 1) == 0
    assert size == 2 * MIB or pool_bytes // size >= 16


def test_never_more_segments_exist_than_the_budget_has() -> None:
    pool = Pool(3 * SEGMENT + 5, SEGMENT)
    assert pool.bytes == 3 * SEGMENT
    segments = pool.obtain(5)
    assert len(segments) == 3
    assert pool.obtain(1) == []
    pool.release(segments.pop())
    assert pool.available() == 1
    assert len(pool.obtain(9)) == 1


def test_a_segment_that_cannot_be_made_costs_none_of_the_others() -> None:
    made = []

    def make(nbytes: int) -> Segment:
        if len(made) == 3:
            raise StoreError("no descriptor is left")
        made.append(Segment(nbytes))
        return made[-1]

    pool = Pool(4 * SEGMENT, SEGMENT, lambda *_: Backing("memfd", 4096, make))
    pool.release(pool.obtain(1)[0])
    with pytest.raises(StoreError, match="no descriptor"):
        pool.obtain(4)
    assert sorted(map(id, pool.obtain(3))) == sorted(map(id, made))


def test_pages_are_spread_over_the_memory_nodes() -> None:
    maps = Path("/proc/self/numa_maps")
    if not maps.exists():
        pytest.skip("this kernel knows no memory nodes")
    segment = Segment(SEGMENT)
    segment.prefault(0, SEGMENT)
    (line,) = [
        one for one in maps.read_text().splitlines() if one.startswith(f"{segment.address:x}")
    ]
    capabilities = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    assert capabilities is not None
    if line.split()[1] == "default" and not int(capabilities[1], 16) >> CAP_SYS_NICE & 1:
        pytest.skip("a container's filter of system calls may not let this process choose")
    assert line.split()[1].startswith("interleave:")


def test_a_segment_that_somebody_sees_is_an_orphan_until_nobody_does() -> None:
    pool = Pool(SEGMENT, SEGMENT)
    (segment,) = pool.obtain(1)
    if not segment.recyclable:
        pytest.skip("this kernel's leases do not tell who holds a segment")
    fd = segment.reader()
    view = mmap.mmap(fd, SEGMENT, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.close(fd)
    pool.release(segment)
    assert pool.orphaned_bytes == SEGMENT
    assert pool.obtain(1) == []
    view.close()
    assert pool.obtain(1) == [segment]
    assert pool.orphaned_bytes == 0


def test_a_segment_that_another_user_has_seen_is_never_filled_again() -> None:
    pool = Pool(2 * SEGMENT, SEGMENT)
    seen, own = pool.obtain(2)
    if not seen.recyclable:
        pytest.skip("this kernel's leases do not tell who holds a segment")
    pool.seen_by_others([seen])
    fd = seen.reader()
    pool.release(seen)
    pool.release(own)
    assert pool.orphaned_bytes == SEGMENT  # it counts for as long as anybody is known to have it
    assert pool.available() == 1
    os.close(fd)
    assert pool.available() == 2
    assert seen not in pool.obtain(2)
    assert pool.orphaned_bytes == 0


def test_nothing_of_an_earlier_model_is_left_behind_a_shorter_part() -> None:
    import ctypes

    pool = Pool(SEGMENT, SEGMENT)
    (segment,) = pool.obtain(1)
    ctypes.memset(segment.address, 0x5A, SEGMENT)
    pool.release(segment)
    (again,) = pool.obtain(1)
    ctypes.memset(again.address, 1, 1000)
    pool.complete(again, 1000)
    held = ctypes.string_at(again.address, SEGMENT)
    assert held == b"\1" * 1000 + bytes(SEGMENT - 1000)


def test_prefault_supplies_the_whole_budget_and_gives_it_out_first() -> None:
    pool = Pool(4 * SEGMENT, SEGMENT)
    pool.prefault(threading.Event())
    assert pool.prefaulted_bytes == 4 * SEGMENT
    assert len(pool.obtain(5)) == 4


@pytest.mark.parametrize(("pool", "segment"), [(SEGMENT - 1, SEGMENT), (MIB, MIB), (10, 0)])
def test_a_pool_that_makes_no_sense_is_refused(pool: int, segment: int) -> None:
    with pytest.raises(ConfigError):
        Pool(pool, segment)


def model(name: str, segments: int, last_used_s: float) -> StoredModel:
    size = segments * SEGMENT
    stored = StoredModel(((0, hash(name), size, 0, 0),), name, (("m", size),), SEGMENT)
    stored.warm = {(0, index): Segment(SEGMENT) for index in range(segments)}
    stored.last_used_s = last_used_s
    return stored


def test_the_least_recently_used_goes_first_and_from_its_end() -> None:
    old, new, comer = model("old", 2, 1.0), model("new", 2, 2.0), model("comer", 0, 3.0)
    victims = choose_victims([new, old, comer], comer, 3)
    assert victims == [(old, (0, 1)), (old, (0, 0)), (new, (0, 1))]


def test_models_in_use_pinned_or_loading_stay_and_so_does_the_newcomer() -> None:
    leased, pinned, loading = model("a", 1, 1.0), model("b", 1, 1.0), model("c", 1, 1.0)
    leased.leases.add(Lease(leased, 1, 0.0, lambda _: None, lambda _: None))
    pinned.pinned = True
    loading.filling = True
    comer = model("comer", 3, 0.0)
    assert choose_victims([leased, pinned, loading, comer], comer, 9) == []


def test_no_more_go_than_are_needed() -> None:
    assert choose_victims([model("a", 3, 1.0)], model("b", 0, 2.0), 0) == []
    assert len(choose_victims([model("a", 3, 1.0)], model("b", 0, 2.0), 2)) == 2


def test_a_models_parts_cover_every_byte_once() -> None:
    stored = StoredModel((), "m", (("a", 5 * MIB), ("b", 0), ("c", 2 * MIB)), SEGMENT)
    pieces = list(stored.pieces())
    assert pieces == [(0, 0), (0, 1), (0, 2), (2, 0)]
    assert [stored.piece_bytes(piece) for piece in pieces] == [2 * MIB, 2 * MIB, MIB, 2 * MIB]


@pytest.mark.parametrize("delay_s", [number * 2e-4 for number in range(20)])
def test_what_the_prefaulter_has_in_hand_is_had_back_for_who_asks(delay_s: float) -> None:
    pool = Pool(6 * SEGMENT, SEGMENT)
    stop = threading.Event()
    thread = threading.Thread(target=pool.prefault, args=(stop,))
    thread.start()
    time.sleep(delay_s)
    assert len(pool.obtain(6)) == 6
    stop.set()
    thread.join()
    assert pool.available() == 0


def test_a_segment_that_may_still_be_written_to_is_not_used_again_before_that_is_over() -> None:
    pool = Pool(2 * SEGMENT, SEGMENT)
    (segment, other) = pool.obtain(2)
    returned = threading.Event()
    pool.abandon(segment, returned.is_set)
    pool.release(other)
    assert pool.obtain(2) == [other]
    assert pool.orphaned_bytes == SEGMENT
    returned.set()
    assert pool.obtain(1) == [segment]
    assert pool.orphaned_bytes == 0


def test_who_waits_for_the_prefaulter_is_not_sent_away_by_other_news() -> None:
    pool = Pool(SEGMENT, SEGMENT)
    (segment,) = pool.obtain(1)
    pool._in_hand = True

    def give_back() -> None:
        for news in range(4):
            time.sleep(0.02)
            with pool._changed:
                if news == 3:
                    pool._free.append(segment)
                    pool._in_hand = False
                pool._changed.notify_all()  # as when a segment elsewhere has been closed

    thread = threading.Thread(target=give_back)
    thread.start()
    assert pool.obtain(1) == [segment]
    thread.join()

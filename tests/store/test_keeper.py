"""The keeper alone, with its fillers' messages held back at will."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sllmctl.errors import ReadError, StoreError
from sllmctl.native import Job, Progress
from sllmctl.store.files import ModelFiles, take_files
from sllmctl.store.filler import Filling, Outcome, fill
from sllmctl.store.keeper import Keeper
from sllmctl.store.lookups import Lookups
from sllmctl.store.pool import Pool
from sllmctl.store.protocol import MAX_MESSAGE_BYTES, MAX_PARTS, MAX_SHARDS, close_fds, encode
from sllmctl.store.residency import Lease, StoredModel
from sllmctl.store.service import Service, Settings

SEGMENT = 2 * 2**20


class Held:
    """Messages to the daemon's thread, delivered when the test says so."""

    def __init__(self) -> None:
        self.messages: list[Callable[[], None]] = []
        self._arrived = threading.Semaphore(0)

    def call_soon(self, message: Callable[[], None]) -> None:
        self.messages.append(message)
        self._arrived.release()

    def deliver(self, count: int = 1) -> None:
        for _ in range(count):
            assert self._arrived.acquire(timeout=30)
            self.messages.pop(0)()


def attach(keeper: Keeper, path: Path) -> Lease:
    files = files_of(path)
    try:
        return keeper.attach(files, pid=1, arrived=lambda _: None, settled=lambda _: None)
    finally:
        files.close()


def files_of(path: Path) -> ModelFiles:
    return take_files(path.parent, path.name, [path.name], [os.open(path, os.O_RDONLY)])


def test_an_attach_between_the_last_segment_and_the_end_of_its_filler_starts_no_second_one(
    tmp_path: Path,
) -> None:
    """A model larger than the pool: the second filler's segments were taken for the first's."""
    path = tmp_path / "model"
    path.write_bytes(os.urandom(3 * SEGMENT))
    held = Held()
    keeper = Keeper(Pool(2 * SEGMENT, SEGMENT), held.call_soon)
    lease = attach(keeper, path)
    while len(lease.model.warm) < 2:
        held.deliver()
    assert lease.model.filling
    keeper.pool.capacity += 1  # room that another model left
    second = attach(keeper, path)
    assert not lease.model.coming
    held.deliver()  # the end of the first filler
    assert not lease.model.filling
    third = attach(keeper, path)
    assert lease.model.filling
    while lease.model.filling:
        held.deliver()
    assert len(lease.model.warm) == 3
    for one in (lease, second, third):
        keeper.release(one)
    keeper.evict(lease.model)
    assert keeper.pool.available() == 3
    assert keeper.models == {}
    keeper.close()


def test_a_filler_that_hangs_outside_a_read_is_not_said_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients would wait for ever: an `open` of a dead server's file never returns."""
    monkeypatch.setattr("sllmctl.store.keeper._FILLERS", 2)
    hung = threading.Event()

    def fill_nothing(work: Filling, full: object, stopped: Callable[[], bool]) -> Outcome:
        hung.wait(60)
        close_fds([fd for fd, _ in work.files])
        return Outcome("it was dead")

    monkeypatch.setattr("sllmctl.store.keeper.fill", fill_nothing)
    held = Held()
    keeper = Keeper(Pool(8 * SEGMENT, SEGMENT), held.call_soon)
    heard: list[str] = []

    def wait_for(name: str) -> StoredModel:
        path = tmp_path / name
        path.write_bytes(bytes(SEGMENT))
        files = files_of(path)
        lease = keeper.attach(
            files, pid=1, arrived=lambda _: heard.append(name), settled=lambda _: None
        )
        files.close()
        return lease.model

    def those_that_go_on() -> set[str]:
        heard.clear()
        keeper.reassure()
        return set(heard)

    deadline = time.monotonic() + 60
    begun = []
    for name in ("dead", "slow"):
        begun.append(wait_for(name))
        while begun[-1].heard_s is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert wait_for("queued").heard_s is None
    assert those_that_go_on() == {"dead", "slow", "queued"}
    dead, slow = begun
    dead.heard_s = time.monotonic() - 81
    assert those_that_go_on() == {"slow", "queued"}
    slow.heard_s = time.monotonic() - 81
    assert those_that_go_on() == set()
    hung.set()
    held.deliver(3)
    keeper.close()


def test_a_file_that_changes_while_it_is_read_is_not_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(SEGMENT))
    held = Held()
    keeper = Keeper(Pool(4 * SEGMENT, SEGMENT), held.call_soon)
    files = files_of(path)
    os.utime(path, ns=(1, 1))
    reasons: list[str | None] = []
    lease = keeper.attach(files, pid=1, arrived=lambda _: None, settled=reasons.append)
    while lease.model.filling:
        held.deliver()
    assert reasons == ["the files changed while they were read"]
    assert lease.model.warm == {}
    assert keeper.pool.available() == 4
    files.close()
    keeper.close()


def test_parts_of_files_that_changed_after_them_are_given_to_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name would have led to them once the files were gone."""
    path = tmp_path / "model"
    path.write_bytes(bytes(2 * SEGMENT))
    held = Held()
    keeper = Keeper(Pool(4 * SEGMENT, SEGMENT), held.call_soon)
    wait, waited = Job.wait, []

    def changing(job: Job, timeout_ms: int | None = None) -> tuple[bool, Progress]:
        """The first look finds every part, and the second that the file has changed."""
        waited.append(None)
        if len(waited) == 2:
            with path.open("r+b") as file:
                file.write(b"x")
        done = False
        while not done:
            done, progress = wait(job)
        return len(waited) == 2, progress

    monkeypatch.setattr("sllmctl.native.Job.wait", changing)
    files = replace(files_of(path), named=True)
    reasons: list[str | None] = []
    lease = keeper.attach(files, pid=1, arrived=lambda _: None, settled=reasons.append)
    lease.model.pinned = True
    while lease.model.filling:
        held.deliver()
    assert reasons == ["the files changed while they were read"]
    assert keeper.find("model") is None
    assert len(lease.model.warm) == 2  # its client was told, and may still look at them
    keeper.release(lease)
    assert keeper.models == {}
    assert keeper.pool.available() == 4
    files.close()
    keeper.close()


def test_a_read_that_does_not_return_keeps_its_segments_from_others_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that cannot end: its threads may still write, so nobody else may get the memory."""
    path = tmp_path / "model"
    path.write_bytes(os.urandom(SEGMENT))
    held = Held()
    keeper = Keeper(Pool(SEGMENT, SEGMENT), held.call_soon)
    keeper.pool.release(*keeper.pool.obtain(1))  # it is made now, with descriptors of its own
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr("sllmctl.native.Job.wait", _failing)
        patch.setattr("sllmctl.native.job._close", lambda *_: False)
        lease = attach(keeper, path)
        while lease.model.filling:
            held.deliver()
        assert keeper.pool.available() == 0
        assert keeper.pool.orphaned_bytes == SEGMENT
    deadline = time.monotonic() + 30
    while keeper.pool.available() == 0:
        assert time.monotonic() < deadline
    assert keeper.pool.orphaned_bytes == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors
    keeper.close()


def test_an_unforeseen_failure_of_a_filler_does_not_wedge_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.write_bytes(os.urandom(SEGMENT))

    def broken(*_: object) -> None:
        raise TypeError("unforeseen")

    monkeypatch.setattr("sllmctl.store.keeper.fill", broken)
    held = Held()
    keeper = Keeper(Pool(SEGMENT, SEGMENT), held.call_soon)
    lease = attach(keeper, path)
    while lease.model.filling:
        held.deliver()
    assert lease.model.warm == {}
    keeper.close()


def test_a_model_was_used_until_its_last_lease_ended(tmp_path: Path) -> None:
    """One that had been used for days was the first to go when its process was started anew."""
    held = Held()
    keeper = Keeper(Pool(2 * SEGMENT, SEGMENT), held.call_soon)
    leases = {}
    for name in ("served", "tried", "newcomer"):
        (tmp_path / name).write_bytes(os.urandom(SEGMENT))
        if name == "newcomer":
            keeper.release(leases["served"])
        leases[name] = attach(keeper, tmp_path / name)
        while leases[name].model.filling:
            held.deliver()
        if name == "tried":
            keeper.release(leases[name])
    assert [model.name for model in keeper.models.values()] == ["served", "newcomer"]
    keeper.close()


def test_a_store_without_descriptors_left_refuses_and_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.write_bytes(os.urandom(SEGMENT))
    keeper = Keeper(Pool(SEGMENT, SEGMENT), Held().call_soon)

    def none_left(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("sllmctl.store.keeper.os.dup", none_left)
    with pytest.raises(OSError, match="Too many"):
        attach(keeper, path)
    assert keeper.models == {}
    assert keeper.pool.available() == 1
    keeper.close()


def test_a_store_without_threads_left_refuses_and_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.write_bytes(os.urandom(SEGMENT))
    held = Held()
    keeper = Keeper(Pool(SEGMENT, SEGMENT), held.call_soon)

    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", none_left)
        with pytest.raises(StoreError, match="can't start new thread"):
            attach(keeper, path)
    assert keeper.models == {}
    assert keeper.pool.available() == 1
    lease = attach(keeper, path)  # and nothing of the first is done late
    while lease.model.filling:
        held.deliver()
    assert len(lease.model.warm) == 1
    assert held.messages == []
    keeper.close()


@pytest.mark.parametrize("mib", [2, 6, 8, 10, 14, 24])
def test_a_part_of_any_size_is_full_when_all_its_chunks_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mib: int
) -> None:
    """Chunks that parts do not count shift all later ones: parts are said to be full too early."""
    path = tmp_path / "model"
    path.write_bytes(os.urandom(2 * mib * 2**20 + 5 * 2**20 + 1))
    counts: list[int] = []
    chunks_done = Job.chunks_done

    def counted(job: Job, first: int, count: int) -> bytes:
        counts.append(count)
        return chunks_done(job, first, count)

    monkeypatch.setattr(Job, "chunks_done", counted)
    pool = Pool(10 * mib * 2**20, mib * 2**20)
    ends: list[int] = []
    files = files_of(path)
    model = StoredModel(files.identity, files.name, files.shards, pool.segment_bytes)
    parts = [
        (piece, segment, model.piece_bytes(piece))
        for piece, segment in zip(model.pieces(), pool.obtain(10), strict=False)
    ]
    work = Filling([(files.fds[0], "model")], model.identity, parts, pool.segment_bytes, 0)
    outcome = fill(work, lambda _, now: ends.append(now.chunks_done), lambda: False)
    assert outcome.reason is None
    assert set(counts) == {ends[-1]}
    data = path.read_bytes()
    for (_, index), segment, nbytes in parts:
        at = index * mib * 2**20
        with os.fdopen(segment.reader(), "rb") as reader:
            assert reader.read(nbytes) == data[at : at + nbytes]


def test_a_model_of_too_many_parts_is_refused_before_anything_is_done_for_it(
    tmp_path: Path,
) -> None:
    """A sparse file costs nobody anything, and its parts took the store's time and memory."""
    worst = [(MAX_SHARDS - 1, MAX_PARTS - 1)] * MAX_PARTS
    assert len(encode({"missing": worst})) < MAX_MESSAGE_BYTES - (64 << 10)
    keeper = Keeper(Pool(SEGMENT, SEGMENT), Held().call_soon)
    path = tmp_path / "model"
    for size in (MAX_PARTS * SEGMENT + 1, 2**40):
        with path.open("wb") as file:
            file.truncate(size)
        with pytest.raises(StoreError, match="parts of 2.1 MB, and a store takes 65536") as refused:
            attach(keeper, path)
        assert "--segment-size" in str(refused.value.hint)
    assert keeper.models == {}
    assert keeper.pool.available() == 1
    keeper.close()


def _failing(*_: object) -> None:
    raise ReadError("cannot read `model` at byte 0: Input/output error (EIO)")


def test_a_status_of_many_leases_is_one_message_and_counts_them_all(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(os.urandom(SEGMENT))
    held = Held()
    keeper = Keeper(Pool(2 * SEGMENT, SEGMENT), held.call_soon)
    leases = [attach(keeper, path) for _ in range(10_000)]
    settings = Settings(tmp_path, tmp_path / "socket", 2 * SEGMENT, SEGMENT)
    loop = asyncio.new_event_loop()
    service = Service(settings, keeper, Lookups(loop))
    loop.close()
    for name in ("m", "m" * 4096, "\U00029e3d" * 4096):
        leases[0].model.name = name
        status = service.status()
        assert len(encode(status)) < MAX_MESSAGE_BYTES
        assert [model["leases"] for model in status["models"]] == [len(leases)]
        assert 5 < len(status["leases"]) < len(leases)
        assert status["leases"][0]["age_s"] >= status["leases"][-1]["age_s"]
    while leases[0].model.filling:
        held.deliver()
    keeper.close()

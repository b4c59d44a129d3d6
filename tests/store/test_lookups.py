"""A disk that hangs holds up its own client, and nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from sllmctl.errors import StoreError
from sllmctl.store import lookups
from sllmctl.store.lookups import Lookups


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_what_takes_too_long_is_an_error_and_its_late_answer_is_discarded(
    loop: asyncio.AbstractEventLoop,
) -> None:
    disk = threading.Event()
    outcomes: list[Future[str]] = []
    discarded: list[str] = []

    def hang() -> str:
        disk.wait(60)
        return "late"

    def done(outcome: Future[str]) -> None:
        outcomes.append(outcome)
        disk.set()  # only now does the disk answer

    def discard(answer: str) -> None:
        discarded.append(answer)
        loop.stop()

    asking = Lookups(loop)
    asking.start(hang, done, discard, deadline_s=0.01)
    loop.run_forever()
    (outcome,) = outcomes
    with pytest.raises(StoreError, match="has not answered"):
        outcome.result()
    assert discarded == ["late"]
    assert asking.waiting == 0


def test_others_are_answered_while_one_hangs(loop: asyncio.AbstractEventLoop) -> None:
    disk = threading.Event()
    answers: list[int] = []

    def done(outcome: Future[int]) -> None:
        answers.append(outcome.result())
        if len(answers) == 3:
            loop.stop()

    asking = Lookups(loop)
    asking.start(lambda: int(disk.wait(60)), done, lambda _: None)
    for number in range(3):
        asking.start(lambda number=number: number, done, lambda _: None)
    loop.run_forever()
    assert sorted(answers) == [0, 1, 2]
    assert asking.waiting == 1
    disk.set()


def test_too_many_that_hang_are_refused(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "MAX_WAITING", 2)
    disk = threading.Event()
    ended: list[bool] = []

    def done(outcome: Future[bool]) -> None:
        ended.append(outcome.result())
        if len(ended) == 2:
            loop.stop()

    asking = Lookups(loop)
    for _ in range(2):
        asking.start(lambda: disk.wait(60), done, lambda _: None)
    with pytest.raises(StoreError, match="2 requests wait for a disk"):
        asking.start(lambda: True, done, lambda _: None)
    disk.set()
    loop.run_forever()
    assert ended == [True, True]


def test_what_goes_wrong_is_told_to_who_asked(loop: asyncio.AbstractEventLoop) -> None:
    outcomes: list[Future[str]] = []

    def fail() -> str:
        raise StoreError("no such model")

    def done(outcome: Future[str]) -> None:
        outcomes.append(outcome)
        loop.stop()

    Lookups(loop).start(fail, done, lambda _: None)
    loop.run_forever()
    with pytest.raises(StoreError, match="no such model"):
        outcomes[0].result()

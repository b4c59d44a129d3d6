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


def test_more_than_there_are_threads_for_wait_their_turn(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred clients at once are no disk that hangs."""
    monkeypatch.setattr(lookups, "MAX_THREADS", 2)
    all_asked = threading.Event()
    answers: list[int] = []

    def answer(number: int) -> int:
        all_asked.wait(60)
        return number

    def done(outcome: Future[int]) -> None:
        answers.append(outcome.result())
        if len(answers) == 10:
            loop.stop()

    asking = Lookups(loop)
    for number in range(10):
        asking.start(lambda number=number: answer(number), done, lambda _: None)
    all_asked.set()
    loop.run_forever()
    assert sorted(answers) == list(range(10))


def test_when_every_thread_hangs_others_are_refused_until_one_is_answered(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "MAX_THREADS", 2)
    disk = threading.Event()
    late: list[Future[bool]] = []
    discarded: list[bool] = []

    def done(outcome: Future[bool]) -> None:
        late.append(outcome)
        if len(late) == 2:
            loop.stop()

    def discard(answer: bool) -> None:
        discarded.append(answer)
        if len(discarded) == 2:
            loop.stop()

    asking = Lookups(loop)
    for _ in range(2):
        asking.start(lambda: disk.wait(60), done, discard, deadline_s=0.01)
    loop.run_forever()
    with pytest.raises(StoreError, match="2 requests wait for a disk"):
        asking.start(lambda: True, done, discard)
    disk.set()
    loop.run_forever()
    assert discarded == [True, True]
    answers: list[bool] = []

    def answered(outcome: Future[bool]) -> None:
        answers.append(outcome.result())
        loop.stop()

    asking.start(lambda: True, answered, discard)
    loop.run_forever()
    assert answers == [True]


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

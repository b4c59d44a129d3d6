"""Reading parts of shards into segments, and saying which are full."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sllmctl.errors import ReadError, SllmError
from sllmctl.native import Extent, Job, Progress, Segment
from sllmctl.store.files import identify
from sllmctl.store.protocol import FILES_CHANGED, close_fds
from sllmctl.store.residency import Identity, Piece

CHUNK_BYTES = 8 * 2**20
_POLL_MS = 10


@dataclass(frozen=True, slots=True)
class Filling:
    """Work for one filler.

    Attributes:
        files: Descriptor and label of each shard that is read; the filler closes them.
        identity: What the descriptors must still be when all is read.
        parts: Which part goes into which segment, and its bytes, in file order.
        segment_bytes: Size of a whole segment.
        threads: Reader threads; 0 for the library's choice.
    """

    files: Sequence[tuple[int, str]]
    identity: Identity
    parts: Sequence[tuple[Piece, Segment, int]]
    segment_bytes: int
    threads: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a filling ended.

    Attributes:
        reason: Why some parts did not arrive; None if all did.
        stuck: None, or a read does not return, and may still write to the segments that did not
            arrive. Says whether it has returned by now.
    """

    reason: str | None
    stuck: Callable[[], bool] | None = None


Full = Callable[[list[Piece], Progress], None]
"""Called with parts whose segments hold all their bytes, and how far the whole filling is."""


def fill(work: Filling, full: Full, stopped: Callable[[], bool]) -> Outcome:
    """Read every part; runs on a thread of its own.

    Args:
        work: What to read.
        full: Called from this thread.
        stopped: Asked a hundred times a second; true ends the work.

    Returns:
        What came of it.
    """
    # Chunks end at multiples of their size in the file: parts must begin at such, to be counted.
    chunk_bytes = math.gcd(CHUNK_BYTES, work.segment_bytes)
    extents = [
        Extent(shard, index * work.segment_bytes, nbytes, segment.address)
        for (shard, index), segment, nbytes in work.parts
    ]
    chunks = [-(-nbytes // chunk_bytes) for _, _, nbytes in work.parts]
    reason, job = None, None
    fds = [fd for fd, _ in work.files]

    def ended() -> bool:
        if job is not None and not job.ended():
            return False
        close_fds(fds)
        fds.clear()
        return True

    try:
        job = Job(
            work.files, extents, keep=work.parts, chunk_bytes=chunk_bytes, threads=work.threads
        )
        try:
            reason = _follow(job, work, chunks, full, stopped)
        finally:
            job.close()
    except (SllmError, OSError) as exc:
        reason = str(exc)
        # A disk that has not answered a read would hang here, too.
        if isinstance(exc, ReadError) and _changed(work):
            reason = FILES_CHANGED
    finally:
        over = ended()
    return Outcome(reason, None if over else ended)


def _changed(work: Filling) -> bool:
    return identify([fd for fd, _ in work.files]) != work.identity


def _follow(
    job: Job,
    work: Filling,
    chunks: Sequence[int],
    full: Full,
    stopped: Callable[[], bool],
) -> str | None:
    """Tell of full segments until the job ends; or why it does not come to that."""
    waiting = list(range(len(work.parts)))
    starts = [sum(chunks[:number]) for number in waiting]
    finished = False
    while not finished:
        finished, progress = job.wait(_POLL_MS)
        if stopped():
            return "the store is going down"
        if finished and _changed(work):
            return FILES_CHANGED
        done = job.chunks_done(0, sum(chunks))
        arrived = [
            number
            for number in waiting
            if all(done[starts[number] : starts[number] + chunks[number]])
        ]
        if arrived or finished:
            waiting = [number for number in waiting if number not in arrived]
            full([work.parts[number][0] for number in arrived], progress)
    return None

"""A checkpoint's bytes as a store has or gets them, and from its files where it does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing

from sllmctl.core.checkpoint import Checkpoint
from sllmctl.core.device_load import DeviceLoad, FillFn, Span, count_files, file_span
from sllmctl.core.device_stream import FileSource, Source
from sllmctl.core.load import LoadStats
from sllmctl.core.progress import ProgressFn, report
from sllmctl.errors import StoreError
from sllmctl.store.client import StoreClient
from sllmctl.store.delivery import attach
from sllmctl.store.protocol import close_fds
from sllmctl.store.residency import Piece

log = logging.getLogger(__name__)


class StoreSpans:
    """Where the parts of a checkpoint are, as far as a store has told.

    Args:
        client: A connection for this alone.
        checkpoint: What is loaded.
        fds: Its shards, open.
        label: How the store shows it.

    Attributes:
        delivery: Which parts came, and from where.

    Raises:
        StoreError: The store refuses.
    """

    def __init__(
        self, client: StoreClient, checkpoint: Checkpoint, fds: Sequence[int], label: str
    ) -> None:
        self._client = client
        self._shards = checkpoint.shards
        self._fds = fds
        self.delivery = attach(client, self._shards, fds, label)
        self._coming = self.delivery.parts()
        self._settled = False
        self._held: dict[Piece, int] = {}

    def arrivals(self) -> Iterator[list[Span]]:
        """What the store sends, as it comes; descriptors end when the next ones are asked for."""
        while not self._settled:
            pieces = self._receive()
            if pieces:
                yield [self._span(piece) for piece in pieces]
            self._let_go(pieces)

    def rest(self) -> list[Span]:
        """What did not come from the store, in the files."""
        return [self._span(piece) for piece in self.delivery.missing()]

    def spans(self, shard: int, start: int, end: int) -> list[Span]:
        """Where a range of a shard is; waits for what the store has not sent yet.

        Descriptors of parts before it end: ask in file order.
        """
        unit = self.delivery.segment_bytes
        wanted = [(shard, index) for index in range(start // unit, -(-end // unit))]
        self._let_go([piece for piece in self._held if piece < (shard, start // unit)])
        while not self._settled and any(piece not in self._held for piece in wanted):
            self._receive()
        return [self._span(piece, start, end) for piece in wanted]

    def interrupt(self) -> None:
        """End a wait for the store, from another thread."""
        self._client.interrupt()

    def close(self) -> None:
        """End the lease, and close what is still open."""
        self._let_go(list(self._held))
        self._client.close()

    def _receive(self) -> list[Piece]:
        """The parts of one message; none when nothing more will come."""
        parts = next(self._coming, None)
        if parts is None:
            self._settled = True
            return []
        self._held.update(parts)
        return list(parts)

    def _span(self, piece: Piece, start: int = 0, end: int | None = None) -> Span:
        """Where of a part what lies between two bytes of the shard is."""
        shard, index = piece
        base = index * self.delivery.segment_bytes
        first = max(start, base)
        last = base + self.delivery.nbytes(piece)
        if end is not None:
            last = min(end, last)
        if piece in self._held:
            path = str(self._shards[shard].path)
            return Span(shard, first, last, self._held[piece], path, first - base)
        return file_span(shard, self._shards[shard], self._fds[shard], first, last)

    def _let_go(self, pieces: Sequence[Piece]) -> None:
        close_fds([self._held.pop(piece) for piece in pieces])


def fill_through_store(
    checkpoint: Checkpoint,
    load: DeviceLoad,
    client: StoreClient,
    label: str,
    *,
    otherwise: FillFn | None,
    progress: ProgressFn | None = None,
) -> FillFn:
    """What brings a checkpoint onto devices from a store, as far as that has or gets it.

    Args:
        checkpoint: What is loaded.
        load: Where to.
        client: A connection for this alone.
        label: How the store shows the checkpoint.
        otherwise: What does it when the store refuses; without it, `StoreError` is raised.
        progress: Told of the bytes.
    """

    done = 0

    def watch() -> None:
        if progress is not None:
            progress("read", done, load.nbytes)

    def fill(fds: Sequence[int], stats: LoadStats) -> None:
        nonlocal done
        client.watch = watch  # its lease, and the client, end with the fill
        try:
            parts = StoreSpans(client, checkpoint, fds, label)
        except StoreError as exc:
            client.close()
            if otherwise is None:
                raise
            log.warning("the store cannot serve this load (%s); it goes to disk", exc)
            otherwise(fds, stats)
            return
        with closing(parts):
            for spans in parts.arrivals():
                now = load.read(spans, report(progress, load.nbytes, done))
                if now is not None:
                    done += now.bytes_done
                    stats.copy_s += max(0.0, now.copy_s - now.read_s)
            parts.delivery.count(stats, checkpoint.shards)
            stats.mapped_bytes = 0  # on its way to a device every byte is copied
            count_files(stats, load.read(parts.rest(), report(progress, load.nbytes, done)))

    return fill


def store_source(
    client: StoreClient, checkpoint: Checkpoint, label: str, required: bool, fds: Sequence[int]
) -> Source:
    """A stream's source: the store as far as it has or gets the checkpoint, else the files.

    Raises:
        StoreError: The store refuses, and is required.
    """
    try:
        return StoreSpans(client, checkpoint, fds, label)
    except StoreError as exc:
        client.close()
        if required:
            raise
        log.warning("the store cannot serve this stream (%s); it comes from disk", exc)
        return FileSource(checkpoint, fds)

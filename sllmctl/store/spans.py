"""A checkpoint's bytes as a store has or gets them, and from its files where it does not."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from sllmctl.core.checkpoint import Checkpoint
from sllmctl.core.device_load import DeviceLoad, FillFn, Span, count_files, file_span, report
from sllmctl.core.device_stream import FileSource, Source
from sllmctl.core.load import LoadStats
from sllmctl.core.progress import ProgressFn
from sllmctl.errors import StoreError
from sllmctl.store.client import StoreClient
from sllmctl.store.protocol import close_fds
from sllmctl.store.residency import Piece

log = logging.getLogger(__name__)


class StoreSpans:
    """Where the parts of a checkpoint are, as far as a store has told.

    It holds the store's descriptors until they are let go, and the lease until `close`.

    Args:
        client: A connection for this alone.
        checkpoint: What is loaded.
        fds: Its shards, open.
        label: How the store shows it.

    Raises:
        StoreError: The store refuses.
    """

    def __init__(
        self, client: StoreClient, checkpoint: Checkpoint, fds: Sequence[int], label: str
    ) -> None:
        self._client = client
        self._shards = checkpoint.shards
        self._fds = fds
        self._segment_bytes = client.segment_bytes
        self._held: dict[Piece, int] = {}
        self._seen: set[Piece] = set()
        self._settled = False
        client.send_shards([shard.path.name for shard in self._shards], fds)
        client.send({"op": "attach", "label": label})
        attached, _ = client.receive()
        try:
            self._coming = {(int(shard), int(index)) for shard, index in attached["coming"]}
        except (KeyError, TypeError, ValueError) as exc:
            raise StoreError("the store's answer makes no sense") from exc

    def batches(self) -> Iterator[tuple[list[Span], str]]:
        """Every part of the checkpoint, once: what the store sends, as it comes, then the rest.

        With it: ``store`` for what was warm, ``disk`` for what the store read for this, ``files``
        for what is left. A batch's descriptors are closed when the next one is asked for.
        """
        while not self._settled:
            pieces = self._receive()
            warm = [piece for piece in pieces if piece not in self._coming]
            read = [piece for piece in pieces if piece in self._coming]
            for batch, origin in ((warm, "store"), (read, "disk")):
                if batch:
                    yield [self._span(piece) for piece in batch], origin
                    self._let_go(batch)
        rest = [piece for piece in self._pieces() if piece not in self._seen]
        if rest:
            yield [self._span(piece) for piece in rest], "files"

    def spans(self, shard: int, start: int, end: int) -> list[Span]:
        """Where a range of a shard is; waits for what the store says is coming.

        Descriptors of parts before it are closed: ask in file order.
        """
        size = self._segment_bytes
        wanted = [(shard, index) for index in range(start // size, -(-end // size))]
        self._let_go([piece for piece in self._held if piece < (shard, start // size)])
        while not self._settled and any(piece not in self._seen for piece in wanted):
            self._receive()
        cut = []
        for piece in wanted:
            span = self._span(piece)
            first, last = max(start, span.start), min(end, span.end)
            offset = span.offset + first - span.start
            cut.append(Span(shard, first, last, span.fd, span.path, offset))
        return cut

    def interrupt(self) -> None:
        """End a wait for the store, from another thread."""
        self._client.close()

    def close(self) -> None:
        """End the lease, and close what is still open."""
        self._let_go(list(self._held))
        self._client.close()

    def _receive(self) -> list[Piece]:
        """The parts of one message; none, once nothing more will come."""
        fds: list[int] = []
        try:
            message, fds = self._client.receive()
            if message.get("event") == "settled":
                self._settled = True
                return []
            return self._take(message["pieces"], fds)
        except (StoreError, KeyError, TypeError, ValueError) as exc:
            log.warning("the store went away during the load (%s); the rest comes from disk", exc)
            close_fds(fds)
            self._settled = True
            self._client.close()
            return []

    def _take(self, named: Any, fds: Sequence[int]) -> list[Piece]:
        pieces = [(int(shard), int(index)) for shard, index in named]
        for piece, fd in zip(pieces, fds, strict=True):
            if not self._exists(piece) or os.fstat(fd).st_size < self._piece_bytes(piece):
                raise StoreError(f"the store sent a part {piece} that does not fit the checkpoint")
        self._held.update(zip(pieces, fds, strict=True))
        self._seen.update(pieces)
        return pieces

    def _span(self, piece: Piece) -> Span:
        shard, index = piece
        start = index * self._segment_bytes
        end = start + self._piece_bytes(piece)
        if piece in self._held:
            return Span(shard, start, end, self._held[piece], f"{self._shards[shard].path}", 0)
        return file_span(shard, self._shards[shard], self._fds[shard], start, end)

    def _piece_bytes(self, piece: Piece) -> int:
        shard, index = piece
        return min(self._segment_bytes, self._shards[shard].size - index * self._segment_bytes)

    def _exists(self, piece: Piece) -> bool:
        shard, index = piece
        return 0 <= shard < len(self._shards) and index >= 0 and self._piece_bytes(piece) > 0

    def _pieces(self) -> Iterator[Piece]:
        for number, shard in enumerate(self._shards):
            for index in range(-(-shard.size // self._segment_bytes)):
                yield number, index

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

    def fill(fds: Sequence[int], stats: LoadStats) -> None:
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
            done = 0
            for spans, origin in parts.batches():
                now = load.read(spans, report(progress, load.nbytes, done))
                if now is None:
                    continue
                done += now.bytes_done
                if origin == "files":
                    count_files(stats, now)
                    continue
                nbytes = sum(
                    max(0, span.end - max(span.start, checkpoint.shards[span.shard].data_offset))
                    for span in spans
                )
                stats.store_bytes += nbytes if origin == "store" else 0
                stats.disk_bytes += nbytes if origin == "disk" else 0
                stats.copy_s += max(0.0, now.copy_s - now.read_s)

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

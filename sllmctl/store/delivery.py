"""What a store sends after an attach: parts of shards, each with the segment that holds it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

from sllmctl.core.checkpoint import Shard
from sllmctl.core.load import LoadStats
from sllmctl.errors import StoreError
from sllmctl.native import PAGE_BYTES
from sllmctl.store.client import StoreClient
from sllmctl.store.protocol import MAX_PARTS, Message, close_fds
from sllmctl.store.residency import Piece

log = logging.getLogger(__name__)


def attach(
    client: StoreClient, shards: Sequence[Shard], fds: Sequence[int], label: str
) -> Delivery:
    """Hand a checkpoint's open files to a store, and lease what it has or gets of them.

    Args:
        client: A connection for this alone.
        shards: The checkpoint's.
        fds: Theirs, open.
        label: How the store shows the checkpoint.

    Raises:
        StoreError: The store refuses.
    """
    client.send_shards([shard.path.name for shard in shards], fds)
    attached = client.ask({"op": "attach", "label": label})
    return Delivery(client, attached, [shard.size for shard in shards])


class Delivery:
    """The parts of a model as they come from a store.

    Args:
        client: That has attached.
        attached: The store's answer.
        sizes: Of the shards' files, in bytes.

    Attributes:
        segment_bytes: Of a whole part.
        got: Parts that came.
        reason: Why others did not, in the store's words, if something went wrong there.

    Raises:
        StoreError: The answer makes no sense.
    """

    def __init__(self, client: StoreClient, attached: Message, sizes: Sequence[int]) -> None:
        self._client = client
        self._sizes = sizes
        self.segment_bytes = client.segment_bytes
        self._from_cache = 0.0
        self.got: set[Piece] = set()
        self.reason: str | None = None
        try:
            self._coming = {(int(shard), int(index)) for shard, index in attached["coming"]}
        except (KeyError, TypeError, ValueError, ArithmeticError) as exc:
            raise StoreError("the store's answer is invalid") from exc
        parts = sum(-(-size // self.segment_bytes) for size in sizes)
        if parts > MAX_PARTS or any(size < 0 for size in sizes):
            raise StoreError(f"the store's answer is invalid: of more than {MAX_PARTS} parts")

    def pieces(self) -> Iterator[Piece]:
        """Every part, in file order."""
        for number, size in enumerate(self._sizes):
            for index in range(-(-size // self.segment_bytes)):
                yield number, index

    def nbytes(self, piece: Piece) -> int:
        """Bytes of a part: a whole segment, but for a shard's last."""
        return min(self.segment_bytes, self._sizes[piece[0]] - piece[1] * self.segment_bytes)

    def tensor_bytes(self, piece: Piece, shards: Sequence[Shard]) -> int:
        """Bytes of a part that are tensors', and not a header's."""
        start = piece[1] * self.segment_bytes
        return max(0, start + self.nbytes(piece) - max(start, shards[piece[0]].data_offset))

    def missing(self) -> list[Piece]:
        """Parts that did not come, in file order."""
        return [piece for piece in self.pieces() if piece not in self.got]

    def parts(self) -> Iterator[dict[Piece, int]]:
        """Parts and their descriptors, which are the caller's, until the store has no more.

        A store that goes away has no more: the client is closed then, and the log says so.
        """
        known = set(self.pieces())
        try:
            while True:
                message, fds = self._client.receive()
                if message.get("event") == "settled":
                    self._settle(message)
                    return
                try:
                    came = self._check(message, fds, known)
                except BaseException:
                    close_fds(fds)
                    raise
                self.got.update(came)
                yield came
        except (StoreError, KeyError, TypeError, ValueError, ArithmeticError) as exc:
            log.warning("the store went away during the load (%s); the rest comes from disk", exc)
            self._client.close()

    def count(self, stats: LoadStats, shards: Sequence[Shard]) -> None:
        """Add to a load's statistics where the parts came from: memory, disk or page cache."""
        read = 0
        for piece in self.got:
            nbytes = self.tensor_bytes(piece, shards)
            if piece in self._coming:
                read += nbytes
            else:
                stats.store_bytes += nbytes
                stats.mapped_bytes += nbytes
        cached = round(read * self._from_cache)
        stats.page_cache_bytes += cached
        stats.disk_bytes += read - cached

    def _settle(self, message: Message) -> None:
        self.reason = str(message["reason"]) if message.get("reason") else None
        disk, cache = int(message.get("disk_bytes", 0)), int(message.get("cache_bytes", 0))
        self._from_cache = cache / (disk + cache) if cache > 0 else 0.0

    def _check(self, message: Message, fds: list[int], known: set[Piece]) -> dict[Piece, int]:
        pieces = [(int(shard), int(index)) for shard, index in message["pieces"]]
        came = dict(zip(pieces, fds, strict=True))
        if len(came) < len(fds):
            raise StoreError("the store sent a part twice")
        for piece, fd in came.items():
            if piece not in known or piece in self.got:
                raise StoreError(f"the store sent a part {piece} that the checkpoint has not")
            # A view of the part goes to the end of its last page.
            nbytes = -(-self.nbytes(piece) // PAGE_BYTES) * PAGE_BYTES
            if os.fstat(fd).st_size < nbytes:
                raise StoreError(f"the store sent a segment of less than {nbytes} bytes")
        return came

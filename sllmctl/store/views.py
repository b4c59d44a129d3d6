"""A checkpoint's shards as views of a store's segments, for those who walk through them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sllmctl.core.checkpoint import Checkpoint
from sllmctl.core.stream import Views
from sllmctl.errors import StoreError
from sllmctl.native import Memory
from sllmctl.store.client import StoreClient
from sllmctl.store.delivery import attach
from sllmctl.store.load import place_parts

log = logging.getLogger(__name__)


class StoreViews:
    """What a store has or gets of a checkpoint, in memory that it shares.

    The lease lasts as long as this, and as the memory that it gave out.

    Args:
        client: A connection for this alone.
        checkpoint: Whose shards.
        fds: Theirs, open.
        label: How the store shows the checkpoint.

    Raises:
        StoreError: The store refuses.
    """

    def __init__(
        self, client: StoreClient, checkpoint: Checkpoint, fds: Sequence[int], label: str
    ) -> None:
        shards = checkpoint.shards
        self._delivery = attach(client, shards, fds, label)
        self._parts = self._delivery.parts()
        self._memories = [Memory.create(shard.size, lease=client) for shard in shards]
        self._settled = False

    def may_hold(self, shard: int, start: int, end: int) -> bool:
        """Whether a range is there, or may come."""
        return not self._settled or self._has(shard, start, end)

    def wait(self, shard: int, start: int, end: int) -> Memory | None:
        """The memory of a whole shard, once it holds a range; None if it never will."""
        while not self._has(shard, start, end):
            parts = next(self._parts, None)
            if parts is None:
                self._settled = True
                return None
            place_parts(self._memories, parts, self._delivery)
        return self._memories[shard]

    def _has(self, shard: int, start: int, end: int) -> bool:
        unit = self._delivery.segment_bytes
        pieces = range(start // unit, -(-end // unit))
        return all((shard, index) in self._delivery.got for index in pieces)


def store_views(
    client: StoreClient, checkpoint: Checkpoint, label: str, required: bool, fds: Sequence[int]
) -> Views | None:
    """A stream's views: of the store as far as it has or gets the checkpoint; else none.

    Raises:
        StoreError: The store refuses, and is required.
    """
    try:
        return StoreViews(client, checkpoint, fds, label)
    except StoreError as exc:
        client.close()
        if required:
            raise
        log.warning("the store cannot serve this stream (%s); it comes from disk", exc)
        return None

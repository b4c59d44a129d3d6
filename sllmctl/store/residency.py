"""What stays in memory: models, their segments, and who has to go for a newcomer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from sllmctl.native import Segment

Identity = tuple[tuple[int, int, int, int, int], ...]
"""Of every shard's descriptor: device, inode, size, and modification and change time in ns."""

Piece = tuple[int, int]
"""Number of the shard, number of the segment within it."""


@dataclass(eq=False, slots=True)
class Lease:
    """A client's use of a model; it lasts as long as its connection.

    Attributes:
        model: What is used.
        pid: Of the process that asked.
        since_s: On the daemon's clock.
        arrived: Called with parts that became warm since; with none to say that others will.
        settled: Called when nothing more will come; with why, if parts did not arrive.
    """

    model: StoredModel
    pid: int
    since_s: float
    arrived: Callable[[list[Piece]], None]
    settled: Callable[[str | None], None]


@dataclass(eq=False, slots=True)
class StoredModel:
    """A model that the store knows.

    Attributes:
        identity: What makes it this model and no other.
        name: The client's label, or the name below the storage path.
        named: It is the name below the storage path, and may be asked for by it.
        shards: Name and size in bytes of each file.
        segment_bytes: Size of a whole segment.
        warm: Segments that hold their bytes.
        coming: Segments that are being filled.
        filling: A filler is at work; it says so when it has ended, after its last segment.
        heard_s: When that was last heard of, on the daemon's clock; None while it waits its turn.
        disk_bytes: What the last filling read from disk,
        cache_bytes: and what it found in the page cache.
        leases: Connections that use it.
        waiting: Those of them that are told what arrives.
        pinned: Stays until it is evicted by hand.
        mixed: Its files changed while they were read: what is warm may be of two versions.
        last_used_s: When a lease on it last began or ended, on the daemon's clock.
    """

    identity: Identity
    name: str
    shards: tuple[tuple[str, int], ...]
    segment_bytes: int
    named: bool = False
    warm: dict[Piece, Segment] = field(default_factory=dict)
    coming: dict[Piece, Segment] = field(default_factory=dict)
    filling: bool = False
    heard_s: float | None = None
    disk_bytes: int = 0
    cache_bytes: int = 0
    leases: set[Lease] = field(default_factory=set)
    waiting: set[Lease] = field(default_factory=set)
    pinned: bool = False
    mixed: bool = False
    last_used_s: float = 0.0

    @property
    def nbytes(self) -> int:
        """Size of its files."""
        return sum(size for _, size in self.shards)

    @property
    def warm_bytes(self) -> int:
        """How much of it is in memory."""
        return sum(self.piece_bytes(piece) for piece in self.warm)

    @property
    def state(self) -> str:
        """``warm``, ``partial``, ``loading`` or ``cold``."""
        if self.filling:
            return "loading"
        if not self.warm:
            return "cold"
        return "warm" if self.warm_bytes == self.nbytes else "partial"

    def pieces(self) -> Iterator[Piece]:
        """Every segment-sized part, in file order."""
        for number, (_, size) in enumerate(self.shards):
            for index in range(-(-size // self.segment_bytes)):
                yield number, index

    def piece_bytes(self, piece: Piece) -> int:
        """Bytes of a part: a whole segment, but for a shard's last."""
        shard, index = piece
        return min(self.segment_bytes, self.shards[shard][1] - index * self.segment_bytes)


def choose_victims(
    models: Iterable[StoredModel], newcomer: StoredModel, count: int
) -> list[tuple[StoredModel, Piece]]:
    """Which segments make room for ``count`` others: the least recently used models' last ones.

    Models in use, pinned or loading stay, and so does the newcomer: a model larger than the pool
    keeps what it has, or each of its loads would throw out what the next one needs first.
    """
    victims: list[tuple[StoredModel, Piece]] = []
    idle = [
        model
        for model in models
        if model is not newcomer and not model.leases and not model.pinned and not model.filling
    ]
    for model in sorted(idle, key=lambda model: model.last_used_s):
        for piece in sorted(model.warm, reverse=True):
            if len(victims) >= count:
                return victims
            victims.append((model, piece))
    return victims

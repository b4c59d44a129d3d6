"""A model that a store has by its name, whether or not this process sees its files."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from sllmctl.core.checkpoint import SUFFIX, Checkpoint, ParsedShard, open_shards, parse_shard
from sllmctl.core.device_load import Span
from sllmctl.core.load import check_stamp, stamp_of
from sllmctl.core.progress import ProgressFn
from sllmctl.errors import CheckpointError, StoreError
from sllmctl.store.client import StoreClient
from sllmctl.store.delivery import Delivery
from sllmctl.store.protocol import (
    FILES_CHANGED,
    MAX_FDS,
    MAX_SHARDS,
    Message,
    allow_descriptors,
    close_fds,
)
from sllmctl.store.residency import Piece

_SPARE_DESCRIPTORS = 64


def _allow(parts: int) -> None:
    with suppress(
        OSError, ValueError
    ):  # the system does not say: the load may do with fewer parts, or none
        allow_descriptors(parts + _SPARE_DESCRIPTORS)


class NamedModel:
    """What a store hands out of a model below its storage path: segments, and files if any.

    It is made when the store has no more to send. The lease is the client's connection, which
    `close` leaves open.

    Args:
        client: A connection for this alone.
        name: The model's, below the store's storage path.
        progress: Called with stage ``read``.

    Attributes:
        checkpoint: Its index, read from the segments.
        client: The connection.
        held: Descriptors of segments, by the part that they hold.
        files: Descriptors of the shards; none where the files are gone.
        delivery: Which parts came, and from where.

    Raises:
        StoreError: The store has no such model, or not all of it, or goes away.
        CheckpointError: The model is damaged, or was written to while the store read it.
    """

    def __init__(self, client: StoreClient, name: str, progress: ProgressFn | None = None) -> None:
        self.client = client
        self.held: dict[Piece, int] = {}
        self.files: list[int] = []
        self._stamps: list[tuple[int, int]] = []
        self._shards: list[tuple[str, int]] = []
        try:
            _allow(MAX_FDS)  # files or parts may come with the answer
            attached = client.ask({"op": "attach", "name": name})
            try:
                self._take_files(attached)
            except (KeyError, TypeError, ValueError) as exc:
                raise StoreError("the store's list of files is invalid") from exc
            self.delivery = Delivery(client, attached, [size for _, size in self._shards])
            _allow(sum(1 for _ in self.delivery.pieces()))
            self._take_segments(progress)
            if self.delivery.reason == FILES_CHANGED:
                raise CheckpointError(
                    f"the files of `{name}` changed while the store read them", hint="load it again"
                )
            missing = self.delivery.missing()
            if missing and not self.files:
                raise StoreError(
                    f"the store has {len(self.held)} of {len(self.held) + len(missing)} parts of "
                    f"`{name}`, and its files are gone",
                    hint="put the model back, or convert it again",
                )
            self.checkpoint = self._open(name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors."""
        close_fds([*self.held.values(), *self.files])
        self.held, self.files = {}, []

    def check_files(self) -> None:
        """Refuse files that were written to since they came: segments hold what they were.

        Raises:
            CheckpointError: One was.
        """
        for shard, fd, stamp in zip(self.checkpoint.shards, self.files, self._stamps, strict=False):
            check_stamp(shard, fd, stamp)

    def span(self, piece: Piece) -> Span:
        """Where a part is: in a segment, or in the shard's own file."""
        shard, index = piece
        start = index * self.client.segment_bytes
        end = start + self.delivery.nbytes(piece)
        path = str(self.checkpoint.shards[shard].path)
        if piece in self.held:
            return Span(shard, start, end, self.held[piece], path, 0)
        return Span(shard, start, end, self.files[shard], path, start)

    def _take_files(self, attached: Message) -> None:
        _allow(min(attached["shards"], MAX_SHARDS) + MAX_FDS)
        while len(self._shards) < attached["shards"]:
            message, fds = self.client.receive()
            self.files += fds
            self._stamps += map(stamp_of, fds)
            listed = list(zip(message["names"], message["sizes"], strict=True))
            if not listed or len(fds) not in (0, len(listed)):
                raise ValueError("as many descriptors as names, or none")
            self._shards += [(Path(str(name)).name, int(size)) for name, size in listed]

    def _take_segments(self, progress: ProgressFn | None) -> None:
        total, done = sum(size for _, size in self._shards), 0
        for parts in self.delivery.parts():
            self.held.update(parts)
            done += sum(map(self.delivery.nbytes, parts))
            if progress is not None:
                progress("read", done, total)

    def _open(self, name: str) -> Checkpoint:
        names = [shard for shard, _ in self._shards]
        foreign = next((shard for shard in names if not shard.endswith(SUFFIX)), None)
        if foreign is not None:
            raise CheckpointError(
                f"`{foreign}` of `{name}` is not a safetensors file, "
                "and its index is not in the store"
            )

        def read(path: Path, number: int) -> ParsedShard:
            size = self._shards[number][1]
            return parse_shard(path, size, lambda n, at: self._read(number, n, at), number)

        return open_shards(Path(name), names, None, read=read)

    def _read(self, shard: int, nbytes: int, offset: int) -> bytes:
        unit, parts = self.client.segment_bytes, []
        end = min(offset + nbytes, self._shards[shard][1])
        while offset < end:
            piece = shard, offset // unit
            count = min(end, (piece[1] + 1) * unit) - offset
            part = (
                os.pread(self.held[piece], count, offset % unit)
                if piece in self.held
                else os.pread(self.files[shard], count, offset)
            )
            if not part:
                break
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

"""Compare a checkpoint with the digests that its conversion took."""

from __future__ import annotations

import bisect
import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import xxhash

from sllmctl.core.checkpoint import (
    INDEX_SUFFIX,
    SUFFIX,
    TensorEntry,
    find_shards,
    holds_sllm_store,
    open_checkpoint,
    open_shards,
    open_sllm_store,
    read_shard,
)
from sllmctl.core.fileio import Buffer, SourceFile, read_file
from sllmctl.core.header import parse_index, shown
from sllmctl.core.manifest import MANIFEST_NAME, FileDigest, Manifest, ShardDigest, read_manifest
from sllmctl.core.progress import ProgressFn
from sllmctl.core.scan import scan_files
from sllmctl.core.sllm_store import INDEX_NAME as SLLM_INDEX_NAME
from sllmctl.core.sllm_store import is_data_name, parts_warning, read_sllm_store
from sllmctl.errors import CheckpointError, CheckpointNotFound, ReadError

_STEP_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: ``manifest``, ``structure``, ``missing``, ``extra``, ``size``, ``digest``, ``read``;
            or ``changed`` or ``part`` (warnings).
        file: Name relative to the checkpoint.
        tensor: The first tensor that is hit, where that is known.
        offset: Where in the file, in bytes, where that is known.
        message: One line for people.
    """

    kind: str
    file: str
    tensor: str | None
    offset: int | None
    message: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        path: The checkpoint.
        checked: ``digests``, or ``structure`` for a checkpoint without any.
        problems: Damage; none means that the checkpoint is whole.
        warnings: Changed files that are not weights; tensors of sllm-store that may be wrong.
        tensors: Number of stored tensors, as far as headers could be read.
        bytes: Bytes that were compared with a digest.
        elapsed_s: How long it took.
    """

    path: Path
    checked: str
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    tensors: int
    bytes: int
    elapsed_s: float

    @property
    def ok(self) -> bool:
        """Whether there is no damage."""
        return not self.problems


def verify(path: Path, *, progress: ProgressFn | None = None) -> VerifyReport:
    """Check a checkpoint's structure and every byte of it that has a digest.

    A checkpoint that sllmctl did not write has no digests: its structure alone is checked.

    Args:
        path: Directory, or a single safetensors file.
        progress: Called with stage ``verify``.

    Raises:
        CheckpointNotFound: There is no checkpoint at all.
    """
    started = time.perf_counter()
    check = _Check(Path(path))
    manifest = check.read_manifest()
    if manifest is None:
        check.structure()
    else:
        check.shards(manifest.shards, manifest.chunk_bytes, progress)
        check.names(manifest)
        for file in manifest.files:
            check.file(file)
    return VerifyReport(
        path=check.path,
        checked="structure" if manifest is None else "digests",
        problems=tuple(sorted(check.problems, key=_place)),
        warnings=tuple(sorted(check.warnings, key=_place)),
        tensors=check.tensors,
        bytes=check.compared_bytes,
        elapsed_s=time.perf_counter() - started,
    )


def _place(problem: Problem) -> tuple[str, int]:
    return problem.file, -1 if problem.offset is None else problem.offset


class _Check:
    """One verification under way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.tensors = 0
        self.compared_bytes = 0
        self._lock = Lock()
        self._entries: dict[str, list[TensorEntry]] = {}

    def found(
        self,
        kind: str,
        file: str,
        message: str,
        *,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        with self._lock:
            self.problems.append(Problem(kind, file, tensor, offset, message))

    def read_manifest(self) -> Manifest | None:
        """The manifest; None where there is none to go by."""
        if self.path.is_dir():
            try:
                return read_manifest(self.path)
            except CheckpointError as exc:
                self.found("manifest", MANIFEST_NAME, str(exc))
        return None

    def structure(self) -> None:
        """Check headers, index and file sizes, without a manifest.

        Raises:
            CheckpointNotFound: No checkpoint is there, nor a manifest of one.
        """
        try:
            if self.problems:
                # The manifest is damaged; opening would stop at that.
                names = [entry.name for entry in self.path.iterdir()]
                if holds_sllm_store(names):
                    self.tensors = len(open_sllm_store(self.path).tensors)
                else:
                    self._open(*find_shards(self.path, names))
            else:
                checkpoint = open_checkpoint(self.path)
                self.tensors = len(checkpoint.tensors)
                if checkpoint.format == "sllm-store":
                    self._parts()
        except CheckpointNotFound as exc:
            if not self.problems:
                raise
            self.found("missing", "", str(exc))
        except CheckpointError as exc:
            self.found("structure", "", str(exc))

    def _parts(self) -> None:
        """Warn of tensors whose bytes sllm-store may have taken from the wrong place."""
        placed, files = read_sllm_store(self.path)
        message = parts_warning(placed.parts)
        if message is not None:
            entry = next(e for e in placed.entries if e.name == placed.parts[0])
            file = files[entry.shard][0].name
            self.warnings.append(Problem("part", file, entry.name, entry.offset, message))

    def _open(self, index: str | None, names: Sequence[str]) -> None:
        weight_map = None
        if index is not None:
            weight_map = parse_index(read_file(self.path / index), str(self.path / index))
            names = sorted(set(weight_map.values()))
        checkpoint = open_shards(
            self.path, names, (index, weight_map) if index and weight_map is not None else None
        )
        self.tensors = len(checkpoint.tensors)

    def shards(
        self, shards: Sequence[ShardDigest], chunk_bytes: int, progress: ProgressFn | None
    ) -> None:
        """Check every shard's header, size and chunks."""
        present: list[ShardDigest] = []
        files: list[tuple[Path, int]] = []
        for shard in shards:
            path = self.path / shard.name
            try:
                source = SourceFile(path)
            except ReadError as exc:
                if exc.errno == errno.ENOENT:
                    self.found("missing", shard.name, f"`{shard.name}` is missing")
                else:
                    self.found("read", shard.name, str(exc))
                continue
            size = source.size
            source.close()
            if size != shard.size:
                self.found(
                    "size",
                    shard.name,
                    f"`{shard.name}` is {size} bytes long; {shard.size} were written",
                    offset=min(size, shard.size),
                )
            present.append(shard)
            files.append((path, min(size, shard.size)))
        self._read_entries([shard.name for shard in present])

        def compare(number: int, chunk: int, digest: bytes) -> None:
            shard, nbytes = present[number], files[number][1]
            start = chunk * chunk_bytes
            end = min(start + chunk_bytes, shard.size)
            with self._lock:
                self.compared_bytes += min(end, nbytes) - start
            if digest != shard.chunk_digest(chunk):
                self._damaged(shard.name, start, end)

        def unreadable(number: int, chunk: int, exc: ReadError) -> None:
            start = chunk * chunk_bytes
            tensor = self._tensors(present[number].name, start, start + chunk_bytes)[:1]
            self.found(
                "read",
                present[number].name,
                str(exc),
                tensor=tensor[0] if tensor else None,
                offset=start,
            )

        scan_files(
            files,
            chunk_bytes=chunk_bytes,
            bypass_cache=False,
            on_chunk=compare,
            on_unreadable=unreadable,
            progress=progress,
        )

    def _read_entries(self, names: Sequence[str]) -> None:
        """Read which tensors are where in the files that are there."""
        if any(map(is_data_name, names)):
            self._entries = {name: [] for name in names}
            try:
                placed, files = read_sllm_store(self.path)
            except CheckpointError as exc:
                self.found("structure", SLLM_INDEX_NAME, str(exc))
                return
            for entry in placed.entries:
                self._entries.setdefault(files[entry.shard][0].name, []).append(entry)
            return
        for name in names:
            try:
                self._entries[name] = read_shard(self.path / name)[1]
            except CheckpointError as exc:
                self.found("structure", name, str(exc), offset=0)

    def _damaged(self, name: str, start: int, end: int) -> None:
        tensors = self._tensors(name, start, end)
        where = ""
        if tensors:
            where = f", in {shown(tensors[0])}"
            where += f" or {len(tensors) - 1} more" if len(tensors) > 1 else ""
        self.found(
            "digest",
            name,
            f"`{name}` is damaged between bytes {start} and {end}{where}",
            tensor=tensors[0] if tensors else None,
            offset=start,
        )

    def _tensors(self, name: str, start: int, end: int) -> list[str]:
        """Names of the tensors that have bytes in a range of a shard."""
        entries = self._entries.get(name, [])
        first = bisect.bisect_right(entries, start, key=lambda entry: entry.offset + entry.nbytes)
        hit = []
        for number in range(first, len(entries)):
            if entries[number].offset >= end:
                break
            if entries[number].nbytes:
                hit.append(entries[number].name)
        return hit

    def names(self, manifest: Manifest) -> None:
        """Check which weights are there, and that shards and index agree."""
        known = {shard.name for shard in manifest.shards}
        listed = [entry.name for entry in self.path.iterdir()]
        for name in listed:
            if name.endswith(SUFFIX) and name not in known:
                self.found("extra", name, f"`{name}` is not a shard of this checkpoint")
        self.tensors = sum(map(len, self._entries.values()))
        if len(self._entries) < len(known) or self.problems:
            return
        try:
            if not holds_sllm_store(listed):
                self._open(*find_shards(self.path, listed))
        except CheckpointError as exc:
            self.found("structure", "", str(exc))
        else:
            if self.tensors != manifest.tensors:
                self.found(
                    "structure",
                    "",
                    f"there are {self.tensors} tensors; {manifest.tensors} were written",
                )

    def file(self, file: FileDigest) -> None:
        """Check a file beside the shards: the index is damage, any other change a warning."""
        path = self.path / file.name
        hasher = xxhash.xxh3_128()
        try:
            source = SourceFile(path)
        except ReadError as exc:
            self.found("read" if path.exists() else "missing", file.name, str(exc))
            return
        try:
            buffer = Buffer(min(_STEP_BYTES, source.size))
            for start in range(0, source.size, _STEP_BYTES):
                nbytes = min(_STEP_BYTES, source.size - start)
                source.read_into(start, buffer, 0, nbytes)
                hasher.update(buffer.view[:nbytes])
        except ReadError as exc:
            self.found("read", file.name, str(exc))
            return
        finally:
            source.close()
        self.compared_bytes += source.size
        if hasher.hexdigest() == file.digest and source.size == file.size:
            return
        if file.name.endswith(INDEX_SUFFIX) or file.name == SLLM_INDEX_NAME:
            self.found("digest", file.name, f"`{file.name}` is damaged")
        else:
            self.warnings.append(
                Problem(
                    "changed",
                    file.name,
                    None,
                    None,
                    f"`{file.name}` has changed since the conversion",
                )
            )

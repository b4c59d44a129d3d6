"""Download with the Hugging Face client. Runs in the process of ``hub.child`` only.

The client itself forgets a half-written file when its process ends (since version 2). So a
large file goes through a partial file of our own, which the next run continues, into the blob
that the client looks for; the client then finds it there and puts the snapshot together.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined, unused-ignore]

from sllmctl.core.hub.cache import COMMIT, repository_folder

_RESUME_MIN_BYTES = 4 * 2**20
# Source: MAX_HTTP_DOWNLOAD_SIZE in the client.
_PLAIN_MAX_BYTES = 50 * 10**9
_WORKERS = 8
_TRIES = 3
_TOO_MANY_REQUESTS = 429
_FINAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}
# The client loses an unfinished chunk when a connection breaks; its own size is 10 MiB.
constants.DOWNLOAD_CHUNK_SIZE = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_USE_XET = os.environ.get("HF_HUB_DISABLE_XET", "").upper() not in {"1", "ON", "YES", "TRUE"}

_Result = TypeVar("_Result")


class HuggingFace:
    """One repository at one commit."""

    def __init__(self, name: str, revision: str | None, timeout_s: float) -> None:
        self._name = name
        self._asked = revision or "main"
        self._timeout_s = timeout_s
        self._folder = repository_folder(name)
        self._etags: dict[str, str | None] = {}
        self._sizes: dict[str, int] = {}
        self.revision = ""

    def list_files(self) -> dict[str, int]:
        """Ask the hub for the files and their sizes in bytes; pins the commit."""
        info = HfApi().model_info(
            self._name, revision=self._asked, files_metadata=True, timeout=self._timeout_s
        )
        if not info.sha or not COMMIT.fullmatch(info.sha):
            raise ValueError(f"the hub names no commit for revision {self._asked}")
        self.revision = info.sha
        for file in info.siblings or []:
            self._sizes[file.rfilename] = file.size or 0
            self._etags[file.rfilename] = file.lfs.sha256 if file.lfs else file.blob_id
        return self._sizes

    def read(self, name: str) -> bytes:
        """Fetch one small file and return its content."""
        return Path(hf_hub_download(self._name, name, revision=self.revision)).read_bytes()

    def bytes_present(self, name: str) -> int:
        """Return how many bytes of a file the cache holds already."""
        blob = self._blob(self._etags[name] or "")
        if (self._snapshot / name).exists() or (blob is not None and blob.exists()):
            return self._sizes[name]
        partial = None if blob is None else _partial_of(blob)
        if partial is None or not partial.exists():
            return 0
        return min(partial.stat().st_size, self._sizes[name])

    def download(self, names: list[str], done_bytes: dict[str, int]) -> Path:
        """Fetch the files; ``done_bytes`` is kept up to date from several threads."""
        # No `with`: a failure is reported at once, not when the other files have arrived.
        pool = ThreadPoolExecutor(_WORKERS)
        for task in as_completed([pool.submit(self._fetch, name, done_bytes) for name in names]):
            task.result()
        self._write_ref()
        return self._snapshot

    @property
    def _snapshot(self) -> Path:
        return self._folder / "snapshots" / self.revision

    def _blob(self, etag: str) -> Path | None:
        return self._folder / "blobs" / etag if re.fullmatch(r"[\w-]+", etag) else None

    def _fetch(self, name: str, done_bytes: dict[str, int]) -> None:
        if self._sizes[name] >= _RESUME_MIN_BYTES and not (self._snapshot / name).exists():
            self._fetch_blob(name, done_bytes)
        hf_hub_download(self._name, name, revision=self.revision)
        done_bytes[name] = self._sizes[name]

    def _fetch_blob(self, name: str, done_bytes: dict[str, int]) -> None:
        url = hf_hub_url(self._name, name, revision=self.revision)
        metadata = _patiently(lambda: get_hf_file_metadata(url))
        blob = self._blob(metadata.etag or "")
        if blob is None or (_USE_XET and getattr(metadata, "xet_file_data", None)):
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        with _locked(_partial_of(blob)) as partial:
            if blob.exists():
                partial.unlink()
                return
            held = partial.stat().st_size
            self._transfer(url, partial, name, done_bytes)
            if held and not _matches(partial, blob.name):
                # A crash of the machine can leave a hole in what an earlier run wrote.
                os.truncate(partial, 0)
                self._transfer(url, partial, name, done_bytes)
            partial.replace(blob)

    def _transfer(self, url: str, partial: Path, name: str, done_bytes: dict[str, int]) -> None:
        """Append what is missing to a partial file, going on after a broken connection."""
        size = self._sizes[name]
        if size > _PLAIN_MAX_BYTES:
            raise ValueError(
                f"`{name}` has {size} bytes, more than the hub sends without Xet:"
                " install hf_xet and set HF_HUB_DISABLE_XET=0"
            )
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}

        def append() -> None:
            with _CountedFile(partial, done_bytes, name) as file:
                held = file.tell()
                if held > size:
                    held = file.truncate(0)
                http_get(url, file, resume_size=held, headers=headers, expected_size=size)

        _patiently(append, progress=lambda: partial.stat().st_size)

    def _write_ref(self) -> None:
        """Record which commit the branch or tag stood for, as the client would."""
        if self._asked == self.revision:
            return
        ref = self._folder / "refs" / self._asked
        ref.parent.mkdir(parents=True, exist_ok=True)
        fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        fresh.write_text(self.revision, encoding="utf-8")
        fresh.replace(ref)


class _CountedFile(io.BufferedWriter):
    """A file opened for appending that notes its size as it grows."""

    def __init__(self, path: Path, done_bytes: dict[str, int], name: str) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._done_bytes = done_bytes
        self._name = name

    def write(self, data: bytes) -> int:  # type: ignore[override]
        written = super().write(data)
        self._done_bytes[self._name] = self.tell()
        return written


def _patiently(action: Callable[[], _Result], progress: Callable[[], int] = int) -> _Result:
    """Repeat an action that fails for a passing reason, as long as there is progress in between."""
    failures, reached = 0, progress()
    while True:
        try:
            return action()
        except Exception as exc:
            status = getattr(getattr(exc, "response", None), "status_code", None)
            refused = status is not None and status < 500 and status != _TOO_MANY_REQUESTS
            failures = failures + 1 if progress() <= reached else 1
            if refused or failures == _TRIES or getattr(exc, "errno", None) in _FINAL_ERRNOS:
                raise
            reached = progress()
            time.sleep(2 ** (failures - 1))


def _partial_of(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.sllmctl.incomplete")


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Hold a partial file alone; whoever waited sees what the one before it left."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False
            if same:
                yield path
                return


def _matches(path: Path, etag: str) -> bool:
    """Compare a file with its digest, where the hub's tag is one (it is for large files)."""
    if not _SHA256.fullmatch(etag):
        return True
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest() == etag

"""Download with the ModelScope client. Runs in the process of ``hub.child`` only.

``modelscope_hub`` is the client that the ``modelscope`` package hands downloads to; imported by
itself it loads no torch.
"""

from __future__ import annotations

import glob
from pathlib import Path

from modelscope_hub import HubApi, ProgressCallback
from modelscope_hub.types import FileInfo

from sllmctl.core.hub.cache import modelscope_target

_WORKERS = 8


class ModelScope:
    """One repository at one revision."""

    def __init__(self, name: str, revision: str | None, timeout_s: float) -> None:
        del timeout_s  # the client has its own, and the parent process ends it on time
        self._name = name
        self._api = HubApi()
        self._files: dict[str, FileInfo] = {}
        self.revision = revision or "master"

    def list_files(self) -> dict[str, int]:
        """Ask the hub for the files and their sizes in bytes."""
        listed = self._api.list_repo_files(self._name, "model", revision=self.revision)
        self._files = {file.path: file for file in listed if not file.is_dir}
        return {name: file.size for name, file in self._files.items()}

    def read(self, name: str) -> bytes:
        """Fetch one small file and return its content."""
        path = self._api.download_file(
            self._name,
            "model",
            name,
            revision=self.revision,
            expected_sha256=self._files[name].sha256,
        )
        return Path(path).read_bytes()

    def bytes_present(self, name: str) -> int:
        """Return how many bytes of a file the cache holds already."""
        target = modelscope_target(self._name, self.revision) / name
        for path in (target, target.with_name(f"{target.name}.incomplete")):
            if path.exists():
                return min(path.stat().st_size, self._files[name].size)
        return 0

    def download(self, names: list[str], done_bytes: dict[str, int]) -> Path:
        """Fetch the files; ``done_bytes`` is kept up to date from several threads."""

        class Meter(ProgressCallback):
            def __init__(self, filename: str, file_size: int) -> None:
                super().__init__(filename, file_size)
                self.seen_bytes = 0

            def update(self, size: int) -> None:
                self.seen_bytes += size
                done_bytes[self.filename] = self.seen_bytes

        path = self._api.download_repo(
            self._name,
            "model",
            revision=self.revision,
            allow_patterns=[glob.escape(name) for name in names],
            max_workers=_WORKERS,
            progress_callbacks=[Meter],
        )
        return Path(path)

"""Tiny models, their checkpoints below a storage path, and directories without weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sllmctl.core.write.convert import convert
from tests.engines.models import Tensors, bare_like, make_source, read_tensors, write_like


@dataclass
class Playground:
    """Models of a test run: ``source`` as from a hub, ``converted``, and ``bare`` of weights."""

    root: Path
    _made: set[str] = field(default_factory=set)

    @property
    def storage(self) -> Path:
        return self.root / "models"

    def source(self, name: str) -> Path:
        path = self.root / "sources" / name
        if not path.exists():
            make_source(name, path)
        return path

    def converted(self, name: str) -> Path:
        path = self.storage / name
        if not path.exists():
            convert(self.source(name), path, verify=False)
        return path

    def bare(self, name: str) -> Path:
        path = self.root / "bare" / name
        if not path.exists():
            bare_like(self.source(name), path)
        return path

    def variant(self, name: str, of: str, *, without: str = "", **tensors: Tensors) -> str:
        """A checkpoint below the storage path that lacks a tensor; its name."""
        kept = {key: t for key, t in read_tensors(self.source(of)).items() if key != without}
        source = write_like(self.source(of), self.root / "sources" / name, kept)
        convert(source, self.storage / name, verify=False)
        return name

    def damaged(self, name: str, of: str) -> str:
        """A converted checkpoint with a flipped bit; its name."""
        shutil.copytree(self.converted(of), self.storage / name)
        shard = self.storage / name / "model.safetensors"
        content = bytearray(shard.read_bytes())
        content[-7] ^= 4
        shard.write_bytes(content)
        return name


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    return Playground(tmp_path_factory.mktemp("engines"))

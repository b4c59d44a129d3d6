"""Fixtures that several folders share."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job hands that on to all its children, and tests of Ctrl-C start some.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests reaches them."""
    for name in list(os.environ):
        if name.startswith("SLLMCTL_") or name == "STORAGE_PATH":
            monkeypatch.delenv(name)
    # Nor does a store that happens to run on this machine.
    monkeypatch.setenv("SLLMCTL_SOCKET", "/nonexistent/sllmctl/store.sock")


def write_checkpoint(
    directory: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], *, index: bool = True
) -> Path:
    """Write a checkpoint with safetensors' own writer, as one finds them on a hub."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for name, tensors in shards.items():
        save_file(dict(tensors), directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if index and len(shards) > 1:
        document = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(document))
    return directory


def some_tensors(seed: int = 0, scale: int = 1) -> dict[str, torch.Tensor]:
    """Tensors of many element types and shapes, empty and scalar ones included."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        f"layers.{seed}.weight": noise(64 * scale, 33).to(torch.bfloat16),
        f"layers.{seed}.bias": noise(33),
        f"layers.{seed}.half": noise(7, 5, 3).to(torch.float16),
        f"layers.{seed}.e4m3": noise(65).to(torch.float8_e4m3fn),
        f"layers.{seed}.e5m2": noise(3, 3).to(torch.float8_e5m2),
        f"layers.{seed}.int8": torch.arange(101, dtype=torch.int8),
        f"layers.{seed}.uint8": torch.arange(200, dtype=torch.uint8),
        f"layers.{seed}.mask": noise(13) > 0,
        f"layers.{seed}.int64": torch.arange(9, dtype=torch.int64),
        f"layers.{seed}.double": noise(4).double(),
        f"layers.{seed}.scalar": torch.tensor(3.25),
        f"layers.{seed}.empty": torch.empty(0, 4),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree (NaN equals itself, -0 does not equal 0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    """Two shards of many element types."""
    return write_checkpoint(
        tmp_path / "models" / "org" / "tiny",
        {
            "model-00001-of-00002.safetensors": some_tensors(0),
            "model-00002-of-00002.safetensors": some_tensors(1),
        },
    )


@pytest.fixture
def make_cold() -> Callable[[Path], None]:
    """Put the files of a directory out of the page cache."""

    def drop(directory: Path) -> None:
        for path in directory.iterdir():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    return drop

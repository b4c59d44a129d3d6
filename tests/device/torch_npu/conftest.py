"""What runs with the real torch_npu on the emulated runtime; `environment.py` says where."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.conftest import some_tensors, write_checkpoint
from tests.store.conftest import RunningStore, start_store, store  # noqa: F401

INSIDE = importlib.util.find_spec("torch_npu") is not None
collect_ignore_glob = [] if INSIDE else ["test_*.py"]
if INSIDE:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_npu  # noqa: F401

COUNTERS = ("h2d_bytes", "async_pinned", "async_pageable", "violations")


class Emulator:
    """The emulated runtime, as torch_npu has loaded it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libascendcl.so")
        self._library.aclemuStat.restype = ctypes.c_uint64
        self._library.aclemuStat.argtypes = [ctypes.c_char_p]
        self._library.aclemuPeek.restype = ctypes.c_void_p
        self._library.aclemuPeek.argtypes = [ctypes.c_void_p]
        self._library.aclemuFail.argtypes = [ctypes.c_char_p]

    def count(self, name: str) -> int:
        """One of its counters."""
        value: int = self._library.aclemuStat(name.encode())
        return value

    @contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """What a block adds to the counters of copies."""
        before = {name: self.count(name) for name in COUNTERS}
        added: dict[str, int] = {}
        yield added
        added |= {name: self.count(name) - before[name] for name in COUNTERS}

    def flip_a_bit(self, address: int) -> None:
        """Damage device memory."""
        place = ctypes.cast(self._library.aclemuPeek(address), ctypes.POINTER(ctypes.c_uint8))
        place[0] ^= 1

    def fail(self, rule: str | None) -> None:
        """``function:nth:code``, ``async:function:nth:code``, or None: nothing fails any more."""
        self._library.aclemuFail(rule.encode() if rule else None)

    def hold(self, held: bool) -> None:
        """While held, no asynchronous copy runs."""
        self._library.aclemuHold(int(held))

    def failed(self) -> bool:
        """Whether a call failed by the last rule."""
        return bool(self._library.aclemuFailed())


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if not hasattr(ctypes.CDLL("libascendcl.so"), "aclemuStat"):
        pytest.skip("a real CANN is loaded; these tests ask the emulated one what happened")
    return Emulator()


@pytest.fixture(autouse=True)
def _nothing_forbidden(emulator: Emulator) -> Iterator[None]:
    """No test may break a rule of the runtime, and none leaves memory behind."""
    emulator.fail(None)
    gc.collect()
    allocated = [torch.npu.memory_allocated(i) for i in range(2)]
    before = emulator.count("violations")
    yield
    emulator.fail(None)
    assert emulator.count("violations") == before
    gc.collect()
    assert [torch.npu.memory_allocated(i) for i in range(2)] == allocated


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards of many element types; the data of the second starts at an odd byte."""
    path = write_checkpoint(
        tmp_path / "models" / "org" / "tiny",
        {
            "model-00001-of-00002.safetensors": some_tensors(0, scale=40),
            "model-00002-of-00002.safetensors": some_tensors(1, scale=20),
        },
    )
    file = path / "model-00002-of-00002.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip(b" ")
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    return path

"""Weight loaders as engines have them, onto NPU memory: no mapped page reaches a device's copy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sllmctl import native
from sllmctl.integrations import engine_gather
from sllmctl.integrations.engine_complete import require_complete
from sllmctl.integrations.engine_copy import WeightWrites
from sllmctl.integrations.engine_source import EngineOptions, EngineWeights, find_model
from tests.conftest import same_bits, write_checkpoint
from tests.device.torch_npu.conftest import Emulator
from tests.store.conftest import RunningStore

RANKS = 2
HIDDEN, HEADS, EXPERTS = 96, 8, 4
SHAPES = {
    "q": (128, HIDDEN),
    "k": (64, HIDDEN),
    "v": (64, HIDDEN),
    "o": (HIDDEN, 128),
    "vocab": (128, HIDDEN),
    "norm": (HIDDEN,),
    **{f"experts.{e}.{part}": (48, HIDDEN) for e in range(EXPERTS) for part in ("gate", "up")},
    **{f"experts.{e}.down": (HIDDEN, 48) for e in range(EXPERTS)},
    **{f"packed.{part}": (12, 256) for part in ("gate", "up")},
    **{f"scale.{part}": () for part in "qkv"},
    "turned": (HIDDEN, 40),
    "moved": (33, 7),
}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        if name.startswith("packed")
        else torch.randn(shape, generator=generator).to(
            torch.float32 if name.startswith("scale") else torch.bfloat16
        )
        for name, shape in SHAPES.items()
    }


class Sliced(nn.Module):
    """What one of two ranks keeps, in the ways in which vLLM's and SGLang's layers write it."""

    def __init__(self, device: str, rank: int) -> None:
        super().__init__()
        self.rank = rank

        def parameter(*shape: int, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.qkv = parameter(64 + 32 + 32, HIDDEN)
        self.o = parameter(HIDDEN, 64)
        self.vocab = parameter(64, HIDDEN)
        self.norm = parameter(HIDDEN, dtype=torch.float32)
        self.w13 = parameter(EXPERTS, 48, HIDDEN)
        self.w2 = parameter(EXPERTS, HIDDEN, 24)
        self.packed = parameter(12, 256, dtype=torch.int32)
        self.scales = parameter(3, dtype=torch.float32)
        self.turned = parameter(20, HIDDEN)
        self.moved = parameter(33, 7)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        def part(dim: int) -> torch.Tensor:
            size = tensor.shape[dim] // RANKS
            return tensor.narrow(dim, self.rank * size, size)

        kind, _, rest = name.partition(".")
        if name in "qkv":
            start, size = {"q": (0, 64), "k": (64, 32), "v": (96, 32)}[name]
            self.qkv.data.narrow(0, start, size).copy_(part(0))
        elif name == "o":
            self.o.data.copy_(part(1))
        elif name == "vocab":
            self.vocab[:64].data.copy_(part(0))
        elif name == "norm":
            self.norm.data.copy_(tensor)  # another dtype
        elif kind == "experts":
            expert, _, which = rest.partition(".")
            if which == "down":
                self.w2.data[int(expert)].copy_(part(1))
            else:
                start = 24 * (which == "up")
                self.w13.data[int(expert)].narrow(0, start, 24).copy_(part(0))
        elif kind == "packed":
            # Side by side: the target's rows are not contiguous.
            self.packed.data.narrow(1, 128 * (rest == "up"), 128).copy_(part(1))
        elif kind == "scale":
            self.scales.data["qkv".index(rest)] = tensor
        elif name == "turned":
            self.turned.data.copy_(part(1).t())
        else:
            self.moved.data = tensor.to(self.moved.device)


def fill(device: str, rank: int, weights: EngineWeights) -> Sliced:
    model = Sliced(device, rank)
    with WeightWrites(model) as writes:
        for name, tensor in weights.tensors():
            model.load(name, tensor)
    require_complete(model, writes, None, weights.names, where="`tiny`")
    return model


@pytest.fixture
def sliced_checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "models" / "sliced", {"model.safetensors": tensors()})


@pytest.fixture(params=["files", "store"])
def weights(request: pytest.FixtureRequest, sliced_checkpoint: Path) -> Iterator[EngineWeights]:
    options = EngineOptions(store="off")
    if request.param == "store":
        store: RunningStore = request.getfixturevalue("store")
        options = EngineOptions(store="require", socket=store.socket)
    found = find_model(options, str(sliced_checkpoint))
    opened = EngineWeights(found, options, rank=0, ranks=RANKS)
    yield opened
    opened.close()


@pytest.mark.parametrize("rank", range(RANKS))
def test_every_slice_arrives_bit_by_bit_through_pinned_memory(
    weights: EngineWeights, emulator: Emulator, rank: int
) -> None:
    expected = fill("cpu", rank, weights).state_dict()
    synchronous = emulator.count("sync_copies")
    with emulator.counting() as counted:
        model = fill(f"npu:{rank}", rank, weights)
    # The ways in which torch copies what is not pinned.
    assert emulator.count("sync_copies") == synchronous
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor.cpu(), expected[name]), name
    assert counted["async_pageable"] == 0
    assert counted["violations"] == 0
    # What the rank holds, each byte once.
    assert counted["h2d_bytes"] == sum(tensor.nbytes for tensor in expected.values())


MOVED = {
    "turned": (torch.arange(600).view(20, 30).t(), torch.preserve_format),
    "turned, in order": (torch.arange(600).view(20, 30).t(), torch.contiguous_format),
    "every other column": (torch.arange(600).view(20, 30)[:, ::2], torch.preserve_format),
    "a slice": (torch.arange(600).view(5, 6, 20)[..., 3:9].mT, torch.preserve_format),
    "broadcast": (torch.arange(30).expand(20, 30), torch.preserve_format),
    "channels last": (torch.arange(600).view(2, 3, 10, 10), torch.channels_last),
    "a scalar": (torch.tensor(7), torch.preserve_format),
    "empty": (torch.empty(3, 0, 2).mT, torch.preserve_format),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_moves_gets_the_strides_that_torch_gives_it(emulator: Emulator, name: str) -> None:
    source, memory_format = MOVED[name]
    with emulator.counting() as counted, WeightWrites(nn.Module()):
        moved = source.to("npu:1", memory_format=memory_format)
    assert moved.stride() == torch.empty_like(source, memory_format=memory_format).stride()
    # The emulated device copies what lies in order, and turns nothing.
    order = sorted(range(source.dim()), key=moved.stride, reverse=True)
    assert torch.equal(moved.permute(order).cpu(), source.permute(order))
    assert counted["async_pageable"] == 0
    assert counted["h2d_bytes"] == moved.nbytes


def test_copies_are_on_the_stream_that_is_current_at_each_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[int] = []

    class Gather(native.Gather):
        def __init__(self, device: native.Device, ring: native.Ring, *, stream: int) -> None:
            super().__init__(device, ring, stream=stream)
            opened.append(stream)

    monkeypatch.setattr(engine_gather, "Gather", Gather)
    source, target = torch.arange(24).view(4, 6), torch.empty((4, 6), dtype=torch.int64).npu()
    first, other = torch.npu.current_stream(), torch.npu.Stream()
    with WeightWrites(nn.Module()):
        for row, stream in enumerate([first, other, first, other]):
            with torch.npu.stream(stream):
                target[row].copy_(source[row])
    assert opened == [first.npu_stream, other.npu_stream]
    assert torch.equal(target.cpu(), source)


def trace_copies(path: Path, trace: Path) -> dict[str, Any]:
    """Fill a model in a process of its own, and say what its copies looked at."""
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        env={**os.environ, "ACLEMU_TRACE": str(trace), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_no_address_of_a_mapping_reaches_the_runtime(
    sliced_checkpoint: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    found = trace_copies(sliced_checkpoint, trace)
    calls = [line for line in trace.read_text().splitlines() if "aclrtMemcpy" in line]
    addresses = [int(text, 16) for line in calls for text in re.findall(r"0x[0-9a-f]+", line)]
    assert len(calls) > len(SHAPES)
    inside = [
        hex(address)
        for address in addresses
        for start, end in found["mapped"]
        if start <= address < end
    ]
    assert not inside
    assert found["mapped_bytes"] > 0


def report(path: str) -> None:
    """Fill a model from mapped files, and print where those are mapped."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_npu  # noqa: F401
    options = EngineOptions(store="off")
    opened = EngineWeights(find_model(options, path), options, rank=1, ranks=RANKS)
    fill("npu:0", 1, opened)
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [
        [int(number, 16) for number in line.split(" ", 1)[0].split("-")]
        for line in lines
        if line.endswith("model.safetensors")
    ]
    print(json.dumps({"mapped": mapped, "mapped_bytes": opened.stats.mapped_bytes}))


if __name__ == "__main__":
    report(sys.argv[1])

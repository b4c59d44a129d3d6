"""Tensors beyond 2 and 4 GiB, and memory that does not grow with the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.verify import verify
from sllmctl.core.write.convert import convert
from tests.raw import entry, write_raw

GIB = 2**30


def sparse_source(directory: Path, sizes: dict[str, int]) -> Path:
    """A checkpoint of holes, with a mark at the end of each tensor."""
    header, end = {}, 0
    for name, nbytes in sizes.items():
        header[name] = entry("BF16", [nbytes // 2], end, end + nbytes)
        end += nbytes
    path = write_raw(directory / "model.safetensors", header)
    base = path.stat().st_size
    os.truncate(path, base + end)
    with path.open("r+b") as file:
        for name, info in header.items():
            file.seek(base + info["data_offsets"][1] - len(name))
            file.write(name.encode())
    return directory


def require_space(directory: Path, nbytes: int) -> None:
    status = os.statvfs(directory)
    if status.f_bavail * status.f_frsize < nbytes + 2 * GIB:
        pytest.skip(f"needs {nbytes / GIB:.0f} GiB of disk space")


# ru_maxrss would count the process that started this one; VmHWM begins anew.
PEAK = (
    "import sys; from pathlib import Path\n"
    "from sllmctl.core.write.convert import convert\n"
    "from sllmctl.core.write.save import save_tensors\n"
    "def peak():\n"
    "    text = Path('/proc/self/status').read_text()\n"
    "    return int(text.split('VmHWM:')[1].split()[0]) * 1024\n"
)


def peak_bytes(code: str, *arguments: object) -> int:
    """Run a script that prints bytes of memory."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


@pytest.mark.slow
def test_tensors_beyond_2_and_4_gib_are_converted_whole(tmp_path: Path, target: Path) -> None:
    sizes = {"above_2_gib": 2 * GIB + 4098, "above_4_gib": 4 * GIB + 6, "small": 10}
    require_space(tmp_path, sum(sizes.values()))
    source = sparse_source(tmp_path / "source", sizes)
    code = (
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), verify=False, max_shard_bytes=4 * 2**30)\n"
        "print(peak())"
    )
    assert peak_bytes(code, source, target) <= 300 * 2**20
    checkpoint = open_checkpoint(target)
    assert {name: found.nbytes for name, found in checkpoint.tensors.items()} == sizes
    assert len(checkpoint.shards) == 3
    for name, found in checkpoint.tensors.items():
        with checkpoint.shards[found.shard].path.open("rb") as file:
            file.seek(found.offset + found.nbytes - len(name))
            assert file.read(len(name)) == name.encode()
            hasher, left = xxhash.xxh3_128(), found.nbytes
            file.seek(found.offset)
            while left:
                left -= len(block := file.read(min(left, 2**26)))
                hasher.update(block)
        zeros, left = xxhash.xxh3_128(), found.nbytes - len(name)
        while left:
            left -= len(block := bytes(min(left, 2**26)))
            zeros.update(block)
        zeros.update(name.encode())
        assert hasher.digest() == zeros.digest()


@pytest.mark.slow
def test_a_tensor_beyond_2_gib_is_saved_whole(tmp_path: Path, target: Path) -> None:
    rows = GIB // 2**15 + 3
    require_space(tmp_path, 2 * GIB)
    code = (
        "import torch; rows = int(sys.argv[1])\n"
        "tensor = torch.zeros(3 + rows * 2**15, dtype=torch.bfloat16)[3:].view(rows, 2**15)\n"
        "tensor[-1, -1] = 1; tensor[rows // 2, 5] = 2; before = peak()\n"
        "save_tensors({'a': tensor}, Path(sys.argv[2])); print(peak() - before)"
    )
    assert peak_bytes(code, rows, target) <= 300 * 2**20
    assert verify(target).ok
    found = open_checkpoint(target).tensors["a"]
    assert found.nbytes == rows * 2**16 > 2 * GIB
    stored = torch.from_file(
        str(target / "model.safetensors"),
        size=(found.offset + found.nbytes) // 2,
        dtype=torch.int16,
    )[found.offset // 2 :].view(torch.bfloat16)
    assert stored[-1] == 1
    assert stored[(rows // 2) * 2**15 + 5] == 2
    assert stored.count_nonzero() == 2


def test_memory_stays_bounded_when_torch_files_are_cast(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = {f"layers.{n}.w": torch.full((8 * 2**20,), 1.5) for n in range(16)}
    torch.save(tensors, source / "pytorch_model.bin")
    code = (
        "import torch; before = peak()\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype='bfloat16'); print(peak() - before)"
    )
    everything = sum(tensor.nbytes for tensor in tensors.values())
    assert peak_bytes(code, source, target) < 300 * 2**20 < everything
    assert {found.dtype for found in open_checkpoint(target).tensors.values()} == {"BF16"}


def test_a_hundred_thousand_tensors_are_no_problem(tmp_path: Path, target: Path) -> None:
    header = {
        f"layers.{n // 100}.experts.{n % 100}.w": entry("BF16", [16, 16], 512 * n, 512 * n + 512)
        for n in range(100_000)
    }
    data = os.urandom(2**16) * (100_000 * 512 // 2**16 + 1)
    source = tmp_path / "source"
    write_raw(source / "model.safetensors", header, data[: 100_000 * 512])
    result = convert(source, target, max_shard_bytes=20 * 2**20)
    assert result.tensors == 100_000
    assert result.shards > 1
    before, after = open_checkpoint(source), open_checkpoint(target)
    contents = [shard.path.read_bytes() for shard in after.shards]
    origin = (source / "model.safetensors").read_bytes()
    for name, found in after.tensors.items():
        first = before.tensors[name].offset
        stored = contents[found.shard][found.offset : found.offset + 512]
        assert stored == origin[first : first + 512]

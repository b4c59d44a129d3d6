"""Loading into host memory: every byte right, whatever the files look like."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sllmctl import load_tensors, save_tensors, stream_tensors
from sllmctl.core import load as load_module
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.load import LoadOptions, load
from sllmctl.errors import CheckpointError, ConfigError, DeviceUnavailable, HostMemoryError
from tests.conftest import same_bits, some_tensors, write_checkpoint

MAP = LoadOptions()
COPY = LoadOptions(map_files="never")


def expected(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    different = [name for name in want if not same_bits(got[name], want[name])]
    assert not different


@pytest.mark.parametrize("options", [MAP, COPY], ids=["mapped", "copied"])
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tiny_checkpoint: Path, options: LoadOptions
) -> None:
    loaded = load(open_checkpoint(tiny_checkpoint), options)
    assert_equal(loaded.tensors, expected(tiny_checkpoint))


def test_a_cold_checkpoint_is_read_from_disk(
    tiny_checkpoint: Path, make_cold: Callable[[Path], None]
) -> None:
    want = {name: tensor.clone() for name, tensor in expected(tiny_checkpoint).items()}
    make_cold(tiny_checkpoint)
    loaded = load(open_checkpoint(tiny_checkpoint), MAP)
    assert_equal(loaded.tensors, want)
    stats = loaded.stats
    assert stats.disk_bytes + stats.page_cache_bytes == stats.bytes


def test_a_resident_checkpoint_is_mapped_and_nothing_is_copied(tiny_checkpoint: Path) -> None:
    for path in tiny_checkpoint.iterdir():
        path.read_bytes()
    stats = load(open_checkpoint(tiny_checkpoint), MAP).stats
    assert stats.mapped_bytes == stats.page_cache_bytes == stats.bytes
    assert stats.disk_bytes == 0
    assert stats.read_s == 0


def test_bytes_add_up_to_the_tensors(tiny_checkpoint: Path) -> None:
    loaded = load(open_checkpoint(tiny_checkpoint), COPY)
    total = sum(tensor.nbytes for tensor in loaded.tensors.values())
    assert loaded.stats.bytes == total
    assert loaded.stats.disk_bytes + loaded.stats.page_cache_bytes == total
    assert loaded.stats.tensors == len(loaded.tensors)


@pytest.mark.parametrize("chunk_bytes", [4096, 65536, 2**24])
@pytest.mark.parametrize("threads", [1, 3])
def test_no_chunk_size_or_thread_count_changes_a_byte(
    tmp_path: Path, chunk_bytes: int, threads: int
) -> None:
    path = write_checkpoint(tmp_path / "m", {"model.safetensors": some_tensors(3, scale=40)})
    options = LoadOptions("never", threads=threads, chunk_bytes=chunk_bytes)
    assert_equal(load(open_checkpoint(path), options).tensors, expected(path))


@pytest.mark.parametrize("padding", range(0, 64, 7))
def test_a_header_of_any_length_loads(tmp_path: Path, padding: int) -> None:
    """Data may start at any byte: 8-byte alignment is usual, and no law."""
    path = write_checkpoint(tmp_path / "m", {"model.safetensors": some_tensors(5)})
    file = path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip(b" ") + b" " * padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    for options in (MAP, COPY):
        loaded = load(open_checkpoint(path), options).tensors
        assert_equal(loaded, expected(path))
        for tensor in loaded.values():
            assert tensor.numel() == 0 or tensor.data_ptr() % tensor.element_size() == 0


def test_a_single_file_loads(tiny_checkpoint: Path) -> None:
    file = tiny_checkpoint / "model-00001-of-00002.safetensors"
    assert_equal(load_tensors(file), load_file(file))


def test_writes_reach_neither_the_file_nor_another_load(tiny_checkpoint: Path) -> None:
    before = {path: path.read_bytes() for path in tiny_checkpoint.glob("*.safetensors")}
    first, second = load_tensors(tiny_checkpoint), load_tensors(tiny_checkpoint)
    for tensor in first.values():
        tensor.zero_()
    assert_equal(second, expected(tiny_checkpoint))
    assert {path: path.read_bytes() for path in before} == before


def test_memory_lives_as_long_as_its_last_tensor(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((2**20,), float(i)) for i in range(8)}
    path = write_checkpoint(tmp_path / "m", {"model.safetensors": tensors})
    loaded = load(open_checkpoint(path), COPY).tensors
    address = min(tensor.data_ptr() for tensor in loaded.values())
    last = loaded.pop("t5")
    del loaded
    gc.collect()
    assert is_mapped(address)
    assert last.sum().item() == 5 * 2**20
    del last
    gc.collect()
    assert not is_mapped(address)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_no_descriptor_stays_open(tiny_checkpoint: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = [load(open_checkpoint(tiny_checkpoint), options) for options in (MAP, COPY)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert kept


def test_a_shard_that_changed_since_its_header_was_read_is_refused(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    shard = checkpoint.shards[1].path
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"model-00002.*changed from \d+ to \d+ bytes"):
        load(checkpoint, MAP)


def test_a_shard_that_vanished_is_named(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    checkpoint.shards[0].path.unlink()
    with pytest.raises(CheckpointError, match="cannot open shard .*model-00001"):
        load(checkpoint, MAP)


def test_a_load_that_cannot_fit_is_refused_before_it_starts(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "available_memory_bytes", lambda: 1000)
    with pytest.raises(HostMemoryError, match=r"needs .* KB of memory, and 1 KB are available"):
        load(open_checkpoint(tiny_checkpoint), COPY)


def test_an_accelerator_is_refused_with_the_way_round(tiny_checkpoint: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="npu:0") as caught:
        load_tensors(tiny_checkpoint, device="npu:0")
    assert caught.value.exit_code == 4
    with pytest.raises(ConfigError, match="not a device"):
        load_tensors(tiny_checkpoint, device="tpu:0")


def test_verifying_needs_digests(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="no digests"):
        load_tensors(tiny_checkpoint, verify=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLLMCTL_MAP", "sometimes"),
        ("SLLMCTL_THREADS", "many"),
        ("SLLMCTL_THREADS", "65"),
        ("SLLMCTL_CHUNK_SIZE", "5000"),
    ],
)
def test_a_wrong_setting_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError):
        LoadOptions.choose()


def test_settings_come_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLMCTL_MAP", "never")
    monkeypatch.setenv("SLLMCTL_THREADS", "2")
    monkeypatch.setenv("SLLMCTL_CHUNK_SIZE", "1MiB")
    assert LoadOptions.choose() == LoadOptions("never", threads=2, chunk_bytes=2**20)
    assert LoadOptions.choose(map_files="auto", threads=5).threads == 5


class TestStream:
    def test_yields_every_tensor_in_file_order(self, tiny_checkpoint: Path) -> None:
        pairs = list(stream_tensors(tiny_checkpoint))
        assert [name for name, _ in pairs] == list(open_checkpoint(tiny_checkpoint).tensors)
        assert_equal(dict(pairs), expected(tiny_checkpoint))

    @pytest.mark.parametrize("options", [MAP, COPY], ids=["mapped", "copied"])
    @pytest.mark.parametrize("window_bytes", [1, 3000, 2**28])
    def test_no_window_changes_a_byte(
        self, tiny_checkpoint: Path, options: LoadOptions, window_bytes: int
    ) -> None:
        from sllmctl.core.stream import stream

        pairs = stream(open_checkpoint(tiny_checkpoint), options, window_bytes=window_bytes)
        assert_equal(dict(pairs), expected(tiny_checkpoint))

    def test_holds_two_windows_at_most(self, tmp_path: Path) -> None:
        from sllmctl.core.stream import stream

        tensors = {f"t{i:02}": torch.full((2**20,), float(i)) for i in range(40)}
        path = write_checkpoint(tmp_path / "m", {"model.safetensors": tensors})
        del tensors
        before, most = anonymous_bytes(), 0
        for name, tensor in stream(open_checkpoint(path), COPY, window_bytes=2**23):
            assert tensor[0].item() == int(name[1:])
            del tensor
            most = max(most, anonymous_bytes() - before)
        assert most < 40 * 2**22 / 2

    def test_stopping_early_ends_the_reads(self, tiny_checkpoint: Path) -> None:
        from sllmctl.core.stream import stream

        before = len(os.listdir("/proc/self/fd"))
        pairs = stream(open_checkpoint(tiny_checkpoint), COPY, window_bytes=1000)
        next(pairs)
        pairs.close()  # type: ignore[attr-defined]
        assert len(os.listdir("/proc/self/fd")) == before


def anonymous_bytes() -> int:
    """Resident private memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")


def replace_by_rename(directory: Path, seed: int) -> None:
    """What the documentation says to do: every shard anew, of the same size."""
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        tensors = {
            name: torch.full_like(tensor, seed) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        fresh = path.with_name(f"{number}.new")
        save_file(tensors, fresh, metadata={"format": "pt"})
        assert fresh.stat().st_size == path.stat().st_size
        fresh.rename(path)


def test_a_shard_that_was_replaced_since_its_header_was_read_is_refused(
    tiny_checkpoint: Path,
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    replace_by_rename(tiny_checkpoint, 2)
    with pytest.raises(CheckpointError, match="was replaced since its header was read"):
        load(checkpoint, MAP)


def test_a_stream_never_mixes_two_versions_of_a_checkpoint(tiny_checkpoint: Path) -> None:
    want = {name: tensor.clone() for name, tensor in expected(tiny_checkpoint).items()}
    pairs = stream_tensors(tiny_checkpoint)
    got = dict([next(pairs)])
    replace_by_rename(tiny_checkpoint, 3)
    got |= dict(pairs)
    assert_equal(got, want)


def test_a_use_of_the_store_that_is_none_is_refused(tiny_checkpoint: Path) -> None:
    for use in (load_tensors, stream_tensors):
        with pytest.raises(ConfigError, match="`required` is not a value of `store`"):
            use(tiny_checkpoint, store="required")


def test_what_is_saved_below_home_is_loaded_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tensors = {"a": torch.arange(3)}
    assert save_tensors(tensors, "~/model") == tmp_path / "model"
    assert_equal(load_tensors("~/model"), tensors)

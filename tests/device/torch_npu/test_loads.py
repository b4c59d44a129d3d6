"""Loads onto NPUs: every byte right, copied once, from pinned memory alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import sllmctl
from sllmctl import api
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.device_load import DeviceLoad, complete, fill_from_files
from sllmctl.core.device_stream import stream_to_device
from sllmctl.core.devices import DeviceSpec
from sllmctl.core.load import Loaded, LoadOptions
from sllmctl.core.placement import DeviceMap
from sllmctl.core.rings import release_staging
from sllmctl.errors import (
    ChecksumMismatch,
    ConfigError,
    DeviceError,
    DeviceUnavailable,
    NativeError,
)
from tests.conftest import same_bits
from tests.device.torch_npu.conftest import Emulator
from tests.raw import entry, write_raw
from tests.store.conftest import RunningStore

NPU0, NPU1 = DeviceSpec("npu", 0), DeviceSpec("npu", 1)
SMALL_CHUNKS = LoadOptions(chunk_bytes=65536, threads=3)


def assert_equal(got: dict[str, torch.Tensor], path: Path) -> None:
    want = api.load(path, store="off").tensors
    assert got.keys() == want.keys()
    assert not [name for name in want if not same_bits(got[name].cpu(), want[name])]


def threads() -> int:
    """Python's, and the native library's."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it may end meanwhile
            names.append((task / "comm").read_text())
    return threading.active_count() + sum(name.startswith("sllm-") for name in names)


def devices_of(loaded: Loaded) -> set[str]:
    return {str(tensor.device) for tensor in loaded.tensors.values()}


@pytest.mark.parametrize("place", ["disk", "page cache"])
@pytest.mark.parametrize("options", [LoadOptions(), SMALL_CHUNKS], ids=["default", "small chunks"])
def test_every_dtype_comes_back_bit_for_bit_and_is_copied_once(
    checkpoint: Path,
    make_cold: Callable[[Path], None],
    emulator: Emulator,
    options: LoadOptions,
    place: str,
) -> None:
    if place == "disk":
        make_cold(checkpoint)
    with emulator.counting() as added:
        loaded = api.load(checkpoint, "npu:1", options=options, store="off")
    stats = loaded.stats
    assert added["h2d_bytes"] == stats.bytes == sum(t.nbytes for t in loaded.tensors.values())
    assert added["async_pageable"] == added["violations"] == 0
    assert added["async_pinned"] > 0
    assert stats.disk_bytes + stats.page_cache_bytes == stats.bytes
    assert (stats.page_cache_bytes == stats.bytes) == (place == "page cache")
    assert stats.mapped_bytes == 0
    assert devices_of(loaded) == {"npu:1"}
    assert_equal(loaded.tensors, checkpoint)


def test_a_tensor_may_start_at_any_byte_of_a_page(tmp_path: Path) -> None:
    """4096 tensors of 4097 bytes: the n-th starts n bytes into a page, in steps of one."""
    count, size = 4096, 4097
    data = torch.randint(0, 256, (count * size,), dtype=torch.uint8)
    header = {f"t{i}": entry("U8", [size], i * size, (i + 1) * size) for i in range(count)}
    path = write_raw(tmp_path / "model.safetensors", header, data.numpy().tobytes())
    tensors = sllmctl.load_tensors(path, "npu:0", store="off")
    rows = data.view(count, size)
    assert not [i for i in range(count) if not torch.equal(tensors[f"t{i}"].cpu(), rows[i])]
    assert {tensor.data_ptr() % 512 for tensor in tensors.values()} == {0}


class TestSeveralDevices:
    def test_each_byte_is_read_once(self, checkpoint: Path, emulator: Emulator) -> None:
        places = {"layers.0": "npu:0", "layers.1": 1, "layers.1.half": torch.device("cpu")}
        with emulator.counting() as added:
            loaded = api.load(checkpoint, device_map=places, store="off")
        assert loaded.tensors["layers.0.weight"].device == torch.device("npu:0")
        assert loaded.tensors["layers.1.weight"].device == torch.device("npu:1")
        on_cpu = loaded.tensors["layers.1.half"]
        assert on_cpu.device == torch.device("cpu")
        assert added["h2d_bytes"] == loaded.stats.bytes - on_cpu.nbytes
        assert loaded.stats.disk_bytes + loaded.stats.page_cache_bytes == loaded.stats.bytes
        assert_equal(loaded.tensors, checkpoint)

    def test_the_host_among_them_pins_for_nobody(
        self, checkpoint: Path, emulator: Emulator
    ) -> None:
        release_staging()
        with emulator.counting() as added:
            loaded = api.load(checkpoint, device_map={"layers.0": "cpu", "": "npu:1"}, store="off")
        assert added["async_pinned"] > 0
        assert added["async_pageable"] == 0
        assert_equal(loaded.tensors, checkpoint)

    @pytest.fixture
    def tied(self, tmp_path: Path) -> Path:
        data = torch.randint(0, 256, (3 * 70000,), dtype=torch.uint8).numpy().tobytes()
        header = {
            "__metadata__": {"lm_head.weight": "embed.weight", "other.weight": "embed.weight"},
            "embed.weight": entry("BF16", [70000], 0, 140000),
            "layers.0.weight": entry("U8", [70000], 140000, 210000),
        }
        write_raw(tmp_path / "tied" / "model.safetensors", header, data)
        return tmp_path / "tied"

    def test_a_tied_tensor_is_one_object_on_a_device_and_read_once_for_two(
        self, tied: Path, emulator: Emulator
    ) -> None:
        places = {"": "npu:0", "lm_head": "npu:1"}
        with emulator.counting() as added:
            loaded = api.load(tied, device_map=places, store="off")
        tensors = loaded.tensors
        assert tensors["other.weight"] is tensors["embed.weight"]
        assert tensors["lm_head.weight"].device == torch.device("npu:1")
        assert same_bits(tensors["lm_head.weight"].cpu(), tensors["embed.weight"].cpu())
        assert loaded.stats.bytes == 210000
        assert loaded.stats.disk_bytes + loaded.stats.page_cache_bytes == 210000
        assert added["h2d_bytes"] == 210000 + 140000
        assert_equal(tensors, tied)

    @pytest.mark.parametrize("spread", ["auto", "balanced", "sequential"])
    def test_accelerators_are_filled_by_their_room(self, checkpoint: Path, spread: str) -> None:
        loaded = api.load(checkpoint, device_map=spread, store="off")
        assert devices_of(loaded) == ({"npu:0"} if spread == "sequential" else {"npu:0", "npu:1"})
        assert_equal(loaded.tensors, checkpoint)


class TestVerify:
    @pytest.fixture
    def converted(self, checkpoint: Path, tmp_path: Path) -> Path:
        return api.convert(checkpoint, tmp_path / "converted")

    def test_what_is_on_the_devices_is_compared(self, converted: Path) -> None:
        for places in ("npu:0", {"": "npu:1", "layers.0": "npu:0"}):
            loaded = api.load(
                converted, device_map=places, options=LoadOptions(verify=True), store="off"
            )
            assert loaded.stats.verified

    def test_a_flipped_bit_in_the_file_is_found(self, converted: Path) -> None:
        file = converted / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-5] ^= 1
        file.write_bytes(raw)
        with pytest.raises(ChecksumMismatch, match=r"damaged between bytes"):
            sllmctl.load_tensors(converted, "npu:0", verify=True, store="off")

    def test_a_flipped_bit_on_the_device_is_found(
        self, converted: Path, emulator: Emulator
    ) -> None:
        opened = open_checkpoint(converted)
        load = DeviceLoad(opened, dict.fromkeys(opened.tensors, NPU0), LoadOptions())
        fill = fill_from_files(opened, load)

        def fill_and_damage(*arguments: object) -> None:
            fill(*arguments)  # type: ignore[arg-type]
            emulator.flip_a_bit(load.build()["layers.1.weight"].data_ptr() + 100)

        with pytest.raises(ChecksumMismatch, match="damaged between bytes 0 and"):
            complete(opened, load, LoadOptions(verify=True), fill_and_damage)


class TestBesideTorch:
    def test_a_load_to_another_device_leaves_torch_where_it_was(self, checkpoint: Path) -> None:
        here = torch.arange(1000).to("npu:0")
        torch.npu.set_device(0)
        tensors = sllmctl.load_tensors(checkpoint, "npu:1", store="off")
        assert torch.npu.current_device() == 0
        assert torch.equal(here.cpu(), torch.arange(1000))
        fresh = torch.empty(1000, dtype=torch.int64, device="npu:0")
        fresh.copy_(torch.arange(1000))
        assert torch.equal(fresh.cpu(), torch.arange(1000))
        assert torch.equal(torch.ones(3).to("npu").cpu(), torch.ones(3))
        assert tensors["layers.0.weight"].device.index == 1

    def test_npu_without_a_number_is_the_current_one(self, checkpoint: Path) -> None:
        with torch.npu.device(1):
            loaded = api.load(checkpoint, "npu", store="off")
        assert devices_of(loaded) == {"npu:1"}

    def test_any_thread_may_load(self, checkpoint: Path) -> None:
        loaded: list[Loaded] = []
        threads = [
            threading.Thread(
                target=lambda n=n: loaded.append(api.load(checkpoint, f"npu:{n % 2}", store="off"))
            )
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(loaded) == 4
        for each in loaded:
            assert_equal(each.tensors, checkpoint)

    def test_memory_that_torch_still_uses_is_not_overwritten(self, checkpoint: Path) -> None:
        """What torch frees while a copy out of it is queued, and the load gets to write."""
        for _ in range(5):
            block = torch.full((2**20,), 7, dtype=torch.uint8).to("npu:0")
            saved = torch.empty_like(block)
            saved.copy_(block)
            del block
            loaded = api.load(checkpoint, "npu:0", store="off")
            assert saved.cpu().eq(7).all()
            assert_equal(loaded.tensors, checkpoint)

    def test_autograd_takes_tensors_of_a_slab_for_strangers(self, checkpoint: Path) -> None:
        tensors = sllmctl.load_tensors(checkpoint, "npu:0", store="off")
        one, other = tensors["layers.0.weight"], tensors["layers.0.bias"]
        before = other._version
        one.copy_(torch.zeros_like(one.cpu()))
        assert other._version == before
        assert one._base is None


def test_sixty_loads_leave_nothing_behind(checkpoint: Path, emulator: Emulator) -> None:
    def held() -> tuple[int, ...]:
        torch.npu.empty_cache()
        names = ("used0", "used1", "pinned_bytes", "streams", "events")
        return (*map(emulator.count, names), len(os.listdir("/proc/self/fd")), threads())

    def load(number: int) -> None:
        places = ("npu:0", "npu:1", {"layers.0": "npu:0", "": "npu:1"})[number % 3]
        api.load(checkpoint, device_map=places, options=SMALL_CHUNKS, store="off")

    for number in range(3):
        load(number)
    before = held()
    for number in range(60):
        load(number)
    assert held() == before
    release_staging()
    assert emulator.count("pinned_bytes") < before[2]


class TestThroughTheStore:
    def test_a_first_load_and_a_warm_one(
        self, store: RunningStore, checkpoint: Path, emulator: Emulator
    ) -> None:
        first = api.load(checkpoint, "npu:0", socket=store.socket, store="require")
        assert first.stats.store_bytes == 0
        assert_equal(first.tensors, checkpoint)
        with emulator.counting() as added:
            warm = api.load(
                checkpoint, device_map={"": "npu:0", "layers.1": "npu:1"}, socket=store.socket
            )
        assert warm.stats.store_bytes == warm.stats.bytes == added["h2d_bytes"]
        assert warm.stats.mapped_bytes == added["async_pageable"] == 0
        assert_equal(warm.tensors, checkpoint)
        store.wait_for(lambda status: not status["leases"])

    def test_a_model_larger_than_the_pool(
        self, start_store: Callable[..., RunningStore], tmp_path: Path
    ) -> None:
        store = start_store(pool="4MiB")
        data = torch.randint(0, 256, (9 * 2**20,), dtype=torch.uint8)
        header = {
            f"t.{i}": entry("U8", [2**20 + 1], i * (2**20 + 1), (i + 1) * (2**20 + 1))
            for i in range(8)
        }
        path = tmp_path / "large"
        write_raw(path / "model.safetensors", header, data[: 8 * (2**20 + 1)].numpy().tobytes())
        for _ in range(2):
            loaded = api.load(path, "npu:0", socket=store.socket, store="require")
            assert_equal(loaded.tensors, path)
        stats = loaded.stats
        assert 0 < stats.store_bytes < stats.bytes
        assert stats.store_bytes + stats.disk_bytes + stats.page_cache_bytes == stats.bytes

    def test_a_stream(
        self, store: RunningStore, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SLLMCTL_SOCKET", str(store.socket))
        for _ in range(2):
            assert_equal(
                dict(sllmctl.stream_tensors(checkpoint, "npu:1", store="require")), checkpoint
            )
        store.wait_for(lambda status: not status["leases"])
        assert store.status()["counters"]["bytes_warm"] > 0


class TestStream:
    def test_memory_on_the_device_is_bounded(self, tmp_path: Path) -> None:
        size, count, window = 2**20, 40, 4 * 2**20
        data = torch.randint(0, 256, (count, size), dtype=torch.uint8)
        header = {f"t{i:02}": entry("U8", [size], i * size, (i + 1) * size) for i in range(count)}
        path = write_raw(tmp_path / "model.safetensors", header, data.numpy().tobytes())
        torch.npu.reset_peak_memory_stats(0)
        for name, tensor in stream_to_device(
            open_checkpoint(path), NPU0, LoadOptions(), window_bytes=window
        ):
            assert torch.equal(tensor.cpu(), data[int(name[1:])])
            del tensor  # or the name would keep its window until the next one is here
        assert torch.npu.max_memory_allocated(0) <= 2 * window + 2**16

    def test_stopping_early_ends_the_reads(self, checkpoint: Path) -> None:
        before = len(os.listdir("/proc/self/fd")), threads()
        pairs = stream_to_device(
            open_checkpoint(checkpoint), NPU1, SMALL_CHUNKS, window_bytes=10_000
        )
        next(pairs)
        pairs.close()  # type: ignore[attr-defined]
        assert (len(os.listdir("/proc/self/fd")), threads()) == before


class TestInTheBackground:
    def test_torch_works_on_while_bytes_move(self, checkpoint: Path) -> None:
        with api.start_load(checkpoint, "npu:1", options=SMALL_CHUNKS, store="off") as loading:
            while not loading.ended:
                assert torch.equal(torch.arange(50).to("npu:0").cpu(), torch.arange(50))
            loaded = loading.wait()
        assert_equal(loaded.tensors, checkpoint)

    def test_a_load_that_is_left_ends(self, tmp_path: Path, emulator: Emulator) -> None:
        size = 64 * 2**20
        header = {"t": entry("U8", [size], 0, size)}
        path = write_raw(tmp_path / "model.safetensors", header, bytes(size))
        emulator.hold(True)
        try:
            with api.start_load(path, "npu:0", store="off") as loading:
                assert not loading.ended
        finally:
            emulator.hold(False)
        with pytest.raises(NativeError, match="cancelled"):
            loading.wait()


class TestRefusals:
    @pytest.fixture
    def large(self, tmp_path: Path) -> Path:
        """A checkpoint of 1 GB, which is a hole: a device here has half of that."""
        path = tmp_path / "large" / "model.safetensors"
        half = 500_000_000
        header = {
            "layers.0.weight": entry("U8", [half], 0, half),
            "layers.1.weight": entry("U8", [half], half, 2 * half),
        }
        write_raw(path, header)
        os.truncate(path, path.stat().st_size + 2 * half)
        return path.parent

    def test_no_room_is_told_before_a_byte_is_read(self, large: Path, emulator: Emulator) -> None:
        with emulator.counting() as added, pytest.raises(DeviceError) as caught:
            sllmctl.load_tensors(large, "npu:1", store="off")
        assert "the load needs 1 GB on npu:1, and 53" in str(caught.value)
        assert caught.value.hint is not None and "device_map" in caught.value.hint
        assert added["h2d_bytes"] == 0

    def test_no_room_on_all_of_them_is_told_as_well(self, large: Path) -> None:
        with pytest.raises(DeviceError, match=r"needs 1 GB, and free are 5.. MB on npu:0, 5.. MB"):
            sllmctl.load_tensors(large, device_map="auto", store="off")

    def test_room_that_torch_holds_unused_counts(self, tmp_path: Path) -> None:
        size = 300 * 2**20
        torch.empty(size, dtype=torch.uint8, device="npu:0")  # freed, and kept by torch
        header = {"t": entry("U8", [size], 0, size)}
        path = write_raw(tmp_path / "model.safetensors", header)
        os.truncate(path, path.stat().st_size + size)
        assert sllmctl.load_tensors(path, "npu:0", store="off")["t"].nbytes == size
        torch.npu.empty_cache()

    def test_a_device_that_is_not_there_is_named(self, checkpoint: Path) -> None:
        with pytest.raises(DeviceUnavailable, match="there is no npu:7: torch sees npu:0 to npu:1"):
            sllmctl.load_tensors(checkpoint, "npu:7")

    @pytest.mark.parametrize("places", [{"layers.0": "npu:0"}, {"": "disk"}, {"": "auto"}])
    def test_a_map_that_makes_no_sense(self, checkpoint: Path, places: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="device_map"):
            DeviceMap.parse(places).place(open_checkpoint(checkpoint))

"""Loads through staging memory, with the host for a device: what every backend has in common."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sllmctl import api
from sllmctl.core import rings
from sllmctl.core import slabs as slabs_module
from sllmctl.core.background import Loading
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.device_load import DeviceLoad, complete, fill_from_files
from sllmctl.core.device_stream import stream_to_device
from sllmctl.core.devices import DeviceSpec
from sllmctl.core.digest import ShardCheck
from sllmctl.core.load import Loaded, LoadOptions
from sllmctl.core.progress import ProgressFn
from sllmctl.errors import (
    CheckpointError,
    ChecksumMismatch,
    ConfigError,
    HostMemoryError,
    NativeError,
)
from sllmctl.store.client import StoreClient
from sllmctl.store.spans import fill_through_store, store_source
from tests.conftest import same_bits, some_tensors, write_checkpoint
from tests.raw import entry, write_raw
from tests.store.conftest import RunningStore, start_store, store  # noqa: F401

CPU = DeviceSpec("cpu")
SMALL = LoadOptions(chunk_bytes=4096, threads=2)


def load_staged(path: Path, options: LoadOptions = SMALL) -> Loaded:
    checkpoint = open_checkpoint(path)
    load = DeviceLoad(checkpoint, placement(path), options)
    return complete(checkpoint, load, options, fill_from_files(checkpoint, load))


def placement(path: Path) -> dict[str, DeviceSpec]:
    checkpoint = open_checkpoint(path)
    return dict.fromkeys([*checkpoint.tensors, *checkpoint.aliases], CPU)


def assert_equal(got: dict[str, torch.Tensor], path: Path) -> None:
    want = api.load(path, store="off").tensors
    assert got.keys() == want.keys()
    assert not [name for name in want if not same_bits(got[name], want[name])]


@pytest.mark.parametrize("slab_bytes", [512, 4096, 2**30])
@pytest.mark.parametrize("cold", [False, True], ids=["page cache", "disk"])
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tiny_checkpoint: Path,
    make_cold: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    slab_bytes: int,
    cold: bool,
) -> None:
    monkeypatch.setattr(slabs_module, "SLAB_BYTES", slab_bytes)
    if cold:
        make_cold(tiny_checkpoint)
    loaded = load_staged(tiny_checkpoint)
    stats = loaded.stats
    assert stats.disk_bytes + stats.page_cache_bytes == stats.bytes
    assert stats.mapped_bytes == 0
    assert_equal(loaded.tensors, tiny_checkpoint)


def test_tied_tensors_are_one_object(tmp_path: Path) -> None:
    header = {"__metadata__": {"tied": "a"}, "a": entry("U8", [5], 0, 5)}
    write_raw(tmp_path / "model.safetensors", header, b"12345")
    tensors = load_staged(tmp_path).tensors
    assert tensors["tied"] is tensors["a"]
    assert tensors["a"].tolist() == list(b"12345")


def load_mapped(path: Path) -> Loaded:
    return api.load(path, store="off")


@pytest.mark.parametrize("load", [load_mapped, load_staged])
class TestPackedInPairs:
    def test_an_odd_axis_is_refused_by_the_tensors_name_before_anything_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[Path], Loaded]
    ) -> None:
        header = {"a": entry("F4", [2, 4], 0, 4), "b": entry("F4", [2, 3], 4, 7)}
        write_raw(tmp_path / "model.safetensors", header, b"1234567")
        monkeypatch.setattr(DeviceLoad, "read", None)
        monkeypatch.setattr("sllmctl.core.load._place", None)
        with pytest.raises(
            CheckpointError, match=r"tensor `b`: .* the last axis of \[2, 3\] is odd"
        ):
            load(tmp_path)

    def test_what_has_no_elements_may_have_any_shape(
        self, tmp_path: Path, load: Callable[[Path], Loaded]
    ) -> None:
        header = {"a": entry("F4", [0, 3], 0, 0), "b": entry("F4", [2, 4], 0, 4)}
        write_raw(tmp_path / "model.safetensors", header, b"1234")
        tensors = load(tmp_path).tensors
        assert tensors["a"].shape == (0, 1)
        assert tensors["b"].view(torch.uint8).tolist() == [[*b"12"], [*b"34"]]


def test_autograd_takes_tensors_of_a_slab_for_strangers(tiny_checkpoint: Path) -> None:
    tensors = load_staged(tiny_checkpoint).tensors
    weight, other = (tensors[f"layers.{i}.weight"].requires_grad_() for i in range(2))
    loss = (weight * weight).sum()
    with torch.no_grad():
        other.zero_()
    loss.backward()
    assert weight.grad is not None


class TestVerify:
    def test_digests_are_compared_with_what_arrived(
        self, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        path = api.convert(tiny_checkpoint, tmp_path / "converted")
        options = LoadOptions(verify=True)
        assert load_staged(path, options).stats.verified
        file = path / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        with pytest.raises(ChecksumMismatch, match=r"damaged between bytes 0 and"):
            load_staged(path, options)

    def test_one_that_is_cancelled_ends_at_the_next_chunk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = api.save_tensors(
            {str(number): torch.zeros(2**20) for number in range(16)}, tmp_path / "m"
        )
        checkpoint, options = open_checkpoint(path), LoadOptions(verify=True)
        load = DeviceLoad(checkpoint, placement(path), options)
        looked_at: list[int] = []

        def check(self: ShardCheck, index: int) -> None:
            looked_at.append(index)
            loading.cancel()

        monkeypatch.setattr(ShardCheck, "check", check)
        started = threading.Event()

        def run(progress: ProgressFn) -> Loaded:
            started.wait()
            fill = fill_from_files(checkpoint, load, progress)
            return complete(checkpoint, load, options, fill, progress)

        told: list[tuple[str, int, int]] = []
        loading = Loading(run, lambda *args: told.append(args))
        started.set()
        with pytest.raises(NativeError, match="cancelled"):
            loading.wait()
        assert looked_at == [0]
        assert told[-1] == ("verify", 0, checkpoint.shards[0].size)


class TestRings:
    def test_one_is_kept_from_load_to_load(self, tiny_checkpoint: Path) -> None:
        rings.release_staging()
        load_staged(tiny_checkpoint)
        (kept,) = rings._idle.values()
        load_staged(tiny_checkpoint)
        assert list(rings._idle.values()) == [kept]
        load_staged(tiny_checkpoint, LoadOptions(chunk_bytes=2**20))  # needs larger slots
        assert list(rings._idle.values()) != [kept]
        rings.release_staging(["npu:0"])
        assert rings._idle
        rings.release_staging([CPU])
        assert not rings._idle

    def test_a_small_load_has_few_slots_however_many_tensors_it_has(self, tmp_path: Path) -> None:
        path = api.save_tensors({str(n): torch.zeros(64) for n in range(100)}, tmp_path / "m")
        rings.release_staging()
        assert_equal(load_staged(path, LoadOptions()).tensors, path)
        (ring,) = rings._idle.values()
        assert ring.count == 2

    @pytest.mark.parametrize(("chunk_mib", "slots"), [(1, 128), (8, 31), (100, 2), (200, 2)])
    def test_many_readers_and_large_chunks_share_256_mib(self, chunk_mib: int, slots: int) -> None:
        rings.release_staging()
        with rings.borrow_ring(CPU, chunk_bytes=chunk_mib * 2**20, chunks=1000, readers=64) as ring:
            assert ring.count == slots
        rings.release_staging()

    def test_loads_at_the_same_time_have_one_each(self, tiny_checkpoint: Path) -> None:
        with (
            rings.borrow_ring(CPU, chunk_bytes=4096, chunks=9, readers=1) as one,
            rings.borrow_ring(CPU, chunk_bytes=4096, chunks=9, readers=1) as other,
        ):
            assert one is not other
            assert_equal(load_staged(tiny_checkpoint).tensors, tiny_checkpoint)
        assert len(rings._idle) == 1

    def test_one_that_a_load_failed_with_is_not_used_again(self) -> None:
        rings.release_staging()
        with (
            pytest.raises(NativeError),
            rings.borrow_ring(CPU, chunk_bytes=4096, chunks=9, readers=1),
        ):
            raise NativeError("no")
        assert not rings._idle

    def test_a_forked_child_starts_without(self, tiny_checkpoint: Path) -> None:
        load_staged(tiny_checkpoint)
        child = os.fork()
        if child == 0:
            os._exit(len(rings._idle) + len(rings._devices))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_room_is_told_before_anything_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sllmctl.core.devices.available_memory_bytes", lambda: 1000)
    with pytest.raises(HostMemoryError, match=r"needs .* KB of memory, and 1 KB are available"):
        load_staged(tiny_checkpoint)


class TestStore:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return write_checkpoint(
            tmp_path / "models" / "m",
            {
                "model-1.safetensors": some_tensors(0, scale=800),
                "model-2.safetensors": some_tensors(1, scale=10),
            },
        )

    def load(self, path: Path, store: RunningStore) -> Loaded:  # noqa: F811
        checkpoint = open_checkpoint(path)
        load = DeviceLoad(checkpoint, placement(path), SMALL)
        client = StoreClient(store.socket)
        fill = fill_through_store(checkpoint, load, client, "m", otherwise=None)
        return complete(checkpoint, load, SMALL, fill)

    def test_a_first_load_and_a_warm_one(
        self,
        model: Path,
        store: RunningStore,  # noqa: F811
    ) -> None:
        first, warm = self.load(model, store), self.load(model, store)
        assert first.stats.store_bytes == 0
        assert warm.stats.store_bytes == warm.stats.bytes
        for loaded in (first, warm):
            assert loaded.stats.mapped_bytes == 0
            assert_equal(loaded.tensors, model)

    def test_a_store_that_dies_leaves_the_rest_to_the_files(
        self,
        model: Path,
        store: RunningStore,  # noqa: F811
    ) -> None:
        self.load(model, store)
        checkpoint = open_checkpoint(model)
        load = DeviceLoad(checkpoint, placement(model), SMALL)
        client = StoreClient(store.socket)
        fill = fill_through_store(checkpoint, load, client, "m", otherwise=None)

        def killed(done: int) -> None:
            store.process.kill()

        read, load.read = load.read, lambda spans, _: read(spans, killed)  # type: ignore[method-assign]
        loaded = complete(checkpoint, load, SMALL, fill)
        assert_equal(loaded.tensors, model)

    def test_a_stream_takes_what_is_warm(
        self,
        model: Path,
        store: RunningStore,  # noqa: F811
    ) -> None:
        for _ in range(2):
            client = StoreClient(store.socket)
            checkpoint = open_checkpoint(model)
            pairs = stream_to_device(
                checkpoint,
                CPU,
                SMALL,
                source=lambda fds, c=client, k=checkpoint: store_source(c, k, "m", True, fds),
                window_bytes=300_000,
            )
            assert_equal(dict(pairs), model)
        store.wait_for(lambda status: not status["leases"])


class TestStream:
    @pytest.mark.parametrize("window_bytes", [1, 3000, 2**28])
    def test_no_window_changes_a_byte_or_the_order(
        self, tiny_checkpoint: Path, window_bytes: int
    ) -> None:
        checkpoint = open_checkpoint(tiny_checkpoint)
        pairs = list(stream_to_device(checkpoint, CPU, SMALL, window_bytes=window_bytes))
        assert [name for name, _ in pairs] == list(checkpoint.tensors)
        assert_equal(dict(pairs), tiny_checkpoint)

    def test_stopping_early_ends_reads_and_thread(self, tiny_checkpoint: Path) -> None:
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        pairs = stream_to_device(open_checkpoint(tiny_checkpoint), CPU, SMALL, window_bytes=1000)
        next(pairs)
        pairs.close()  # type: ignore[attr-defined]
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before

    def test_a_stream_does_not_verify(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(ConfigError, match="cannot verify"):
            next(stream_to_device(open_checkpoint(tiny_checkpoint), CPU, LoadOptions(verify=True)))


class TestInTheBackground:
    def test_what_it_loads_is_what_load_does(self, tiny_checkpoint: Path) -> None:
        with api.start_load(tiny_checkpoint, store="off") as loading:
            assert_equal(loading.wait().tensors, tiny_checkpoint)
        assert loading.ended and loading.wait() is loading.wait()

    def test_a_failure_is_raised_by_every_wait(self, tiny_checkpoint: Path) -> None:
        def fail(_: ProgressFn) -> Loaded:
            raise NativeError("no")

        loading = Loading(fail, None)
        for _ in range(2):
            with pytest.raises(NativeError, match="no"):
                loading.wait()

    def test_one_that_is_left_ends(self) -> None:
        left = threading.Event()

        def load_for_ever(progress: ProgressFn) -> Loaded:
            left.wait()
            while True:
                progress("read", 0, 1)

        with Loading(load_for_ever, None) as loading:
            assert not loading.ended
        left.set()
        with pytest.raises(NativeError, match="cancelled"):
            loading.wait()

"""Loads to devices as Python sees them, on the backend that every machine has."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sllmctl import errors, native
from sllmctl._native import ffi, lib
from sllmctl.native import calls

CHUNK_BYTES = 16384
SLOT_BYTES = CHUNK_BYTES + native.PAGE_BYTES


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[tuple[int, str, bytes]]:
    """Descriptor, name and bytes of a file of an odd size."""
    data = bytes(range(256)) * 1200 + b"tail"
    path = tmp_path / "shard.safetensors"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    yield fd, str(path), data
    os.close(fd)


def finish(job: native.Job) -> native.Progress:
    done = False
    while not done:
        done, progress = job.wait()
    return progress


def test_a_load_goes_through_the_ring_to_two_devices_and_the_host(
    shard: tuple[int, str, bytes],
) -> None:
    fd, path, data = shard
    places = [native.Memory.create(len(data)) for _ in range(3)]
    part = len(data) // 2
    extents = [
        native.Extent(0, 0, part, places[0].address + 3, 0),
        native.Extent(0, 1, part, places[1].address, 1),
        native.Extent(0, 0, len(data), places[2].address),
    ]
    with (
        native.Device("cpu") as one,
        native.Device("cpu") as two,
        native.Ring(one, SLOT_BYTES, 2) as ring,
    ):
        for _ in range(2):  # one load after the other uses the ring
            with native.Job(
                [(fd, path)],
                extents,
                keep=places,
                chunk_bytes=CHUNK_BYTES,
                devices=[one, two],
                ring=ring,
            ) as job:
                progress = finish(job)
                assert progress.bytes_done == progress.bytes_total == 2 * part + len(data)
    assert bytes(places[0].buffer[3 : 3 + part]) == data[:part]
    assert bytes(places[1].buffer[:part]) == data[1 : 1 + part]
    assert bytes(places[2].buffer) == data


def test_a_job_keeps_its_ring_and_devices(shard: tuple[int, str, bytes]) -> None:
    fd, path, data = shard
    place = native.Memory.create(len(data))
    extents = [native.Extent(0, 0, len(data), place.address, 0)]
    device = native.Device("cpu")
    ring = native.Ring(device, SLOT_BYTES, 2)
    device.close()
    with pytest.raises(errors.NativeError) as caught:
        native.Ring(device, SLOT_BYTES, 2)
    assert caught.value.status == lib.SLLM_E_INVALID
    device = native.Device("cpu")
    with native.Job(
        [(fd, path)], extents, keep=place, chunk_bytes=CHUNK_BYTES, devices=[device], ring=ring
    ) as job:
        ring.close()
        device.close()
        del ring, device
        gc.collect()
        finish(job)
    assert bytes(place.buffer) == data


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(errors.DeviceUnavailable, match="no device cpu:7: 1 found"):
        native.Device("cpu", 7)
    with pytest.raises(errors.DeviceUnavailable, match="no backend `tpu`"):
        native.Device("tpu")


def test_a_load_to_devices_needs_a_ring_whose_slots_hold_a_chunk(
    shard: tuple[int, str, bytes],
) -> None:
    fd, path, data = shard
    place = native.Memory.create(len(data))
    extents = [native.Extent(0, 0, len(data), place.address, 0)]
    device = native.Device("cpu")
    with pytest.raises(errors.NativeError, match="needs devices and a ring"):
        native.Job([(fd, path)], extents, keep=place, devices=[device])
    ring = native.Ring(device, CHUNK_BYTES, 2)
    with pytest.raises(errors.NativeError, match=f"slots of {CHUNK_BYTES} bytes do not hold"):
        native.Job(
            [(fd, path)], extents, keep=place, chunk_bytes=CHUNK_BYTES, devices=[device], ring=ring
        )
    with pytest.raises(errors.NativeError, match="no ring"):
        native.Ring(device, SLOT_BYTES, 1)


class HungLibrary:
    """A library whose runtime does not answer when a ring or a device is made, until it may."""

    def __init__(self) -> None:
        self.entered, self.may_answer, self.ended = (threading.Event() for _ in range(3))

    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)

    def _hang(self, call: Callable[..., int], *arguments: object) -> int:
        self.entered.set()
        assert self.may_answer.wait(60)
        return call(*arguments)

    def sllm_device_open(self, *arguments: object) -> int:
        return self._hang(lib.sllm_device_open, *arguments)

    def sllm_ring_create(self, *arguments: object) -> int:
        return self._hang(lib.sllm_ring_create, *arguments)

    def _end(self, destroy: Callable[[object], None], handle: object) -> None:
        destroy(handle)
        self.ended.set()

    def sllm_device_close(self, handle: object) -> None:
        self._end(lib.sllm_device_close, handle)

    def sllm_ring_destroy(self, handle: object) -> None:
        self._end(lib.sllm_ring_destroy, handle)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, however the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("what", ["device", "ring"])
def test_ctrl_c_interrupts_a_runtime_that_hangs_and_nothing_stays_behind(
    what: str, ctrl_c: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, device = HungLibrary(), native.Device("cpu")

    def interrupt() -> None:
        assert library.entered.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("sllmctl.native.devices.lib", library)
    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        native.Device("cpu") if what == "device" else native.Ring(device, SLOT_BYTES, 2)
    other.join()
    assert not library.ended.is_set()
    library.may_answer.set()
    assert library.ended.wait(60)


def test_a_gather_packs_rows_through_slots() -> None:
    source = native.Memory.create(64 * 1000)
    target = native.Memory.create(64 * 300)
    source.buffer[:] = bytes(range(250)) * 256
    with native.Device("cpu") as device, native.Ring(device, 4096, 2) as ring:
        with native.Gather(device, ring) as gather:
            gather.copy(
                target.address,
                source.address + 7,
                rows=64,
                row_bytes=300,
                source_stride_bytes=1000,
            )
            gather.synchronize()
        with pytest.raises(errors.NativeError, match="not a gather"):
            gather.synchronize()
        kept = native.Gather(device, ring)
        with pytest.raises(errors.NativeError, match="is not one"):
            kept.copy(target.address, source.address, rows=2, row_bytes=2, source_stride_bytes=1)
        with pytest.raises(errors.NativeError, match="not a gather"):  # it has closed itself
            kept.copy(target.address, source.address, rows=1, row_bytes=1, source_stride_bytes=1)
    assert kept.close()
    rows = [bytes(source.buffer[7 + i * 1000 : 307 + i * 1000]) for i in range(64)]
    assert bytes(target.buffer) == b"".join(rows)


def test_a_slow_device_has_not_stalled_as_long_as_bytes_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, calls_made, moved = [0.0], [0], [0]

    def call(_: int) -> int:
        clock[0] += 40
        calls_made[0] += 1
        moved[0] += 1 if calls_made[0] <= 5 else 0
        return int(lib.SLLM_E_BUSY)

    monkeypatch.setattr("sllmctl.native.calls.time.monotonic", lambda: clock[0])
    with pytest.raises(errors.DeviceError, match="not copied anything for 60 s"):
        calls.wait_in_slices(call, 60, ffi.new("sllm_error *"), lambda: moved[0])
    assert calls_made[0] == 7  # the last one that moved something, and two more


def test_a_gather_repeats_a_row_that_has_no_stride() -> None:
    source, target = native.Memory.create(300), native.Memory.create(40 * 300)
    source.buffer[:] = bytes(range(150)) * 2
    with (
        native.Device("cpu") as device,
        native.Ring(device, 4096, 2) as ring,
        native.Gather(device, ring) as gather,
    ):
        gather.copy(target.address, source.address, rows=40, row_bytes=300, source_stride_bytes=0)
        gather.synchronize()
    assert bytes(target.buffer) == bytes(source.buffer) * 40


def test_a_forked_child_may_not_use_devices_and_rings(shard: tuple[int, str, bytes]) -> None:
    script = """
        import os, sys
        from sllmctl import errors, native
        from sllmctl._native import lib

        def refused(call):
            try:
                call()
            except errors.NativeError as exc:
                return exc.status == lib.SLLM_E_FORKED

        path, size = sys.argv[1], int(sys.argv[2])
        fd = os.open(path, os.O_RDONLY)
        memory = native.Memory.create(size)
        extents = [native.Extent(0, 0, size, memory.address, 0)]
        device = native.Device("cpu")
        ring = native.Ring(device, 12288, 2)
        load = lambda devices, ring: native.Job(
            [(fd, path)], extents, keep=memory, chunk_bytes=8192, devices=devices, ring=ring
        )
        child = os.fork()
        if child == 0:
            ours = native.Device("cpu")
            assert refused(lambda: native.Ring(device, 12288, 2))
            assert refused(lambda: load([device], ring))
            assert refused(lambda: load([ours], ring))
            ring.close()
            device.close()
            sys.exit(7)
        assert os.waitpid(child, 0)[1] == 7 << 8
        with load([device], ring) as job:
            while not job.wait()[0]:
                pass
        assert bytes(memory.buffer) == open(path, "rb").read()
    """
    _, path, data = shard
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), path, str(len(data))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_backend_that_registers_no_memory_says_so(shard: tuple[int, str, bytes]) -> None:
    with (
        native.Device("cpu") as device,
        pytest.raises(errors.NativeError, match="cpu registers no memory"),
    ):
        native.Registered(device, shard[0])

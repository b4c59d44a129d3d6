"""Staging memory: a ring a process and device, kept from load to load, for pinning takes time."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sllmctl.core.devices import DeviceSpec
from sllmctl.native import PAGE_BYTES, Device, Ring

READERS = 8
CHUNK_BYTES = 8 * 2**20
_SLOTS_A_READER = 2
"""One to read into, while another is being copied from."""
_RING_BYTES = 256 * 2**20
"""What large chunks or many readers share: pinned memory is lost to all else on the machine, and
takes time to get. Two slots there are in any case, so that a read and a copy overlap."""

_lock = threading.Lock()
_devices: dict[DeviceSpec, Device] = {}
_idle: dict[DeviceSpec, Ring] = {}


def open_device(spec: DeviceSpec) -> Device:
    """The native library's device; opened once a process.

    Raises:
        DeviceUnavailable: Its runtime library is missing, or there is no such device.
        DeviceError: The runtime refuses.
    """
    with _lock:
        if not _devices:
            # A runtime may end at exit, and pinned memory has to go before: registered later,
            # this runs earlier than what torch registered when it was imported.
            atexit.register(release_staging)
        if spec not in _devices:
            _devices[spec] = Device(spec.kind, spec.ordinal)
        return _devices[spec]


@contextmanager
def borrow_ring(spec: DeviceSpec, *, chunk_bytes: int, chunks: int, readers: int) -> Iterator[Ring]:
    """Lend a ring for one load at a time; two loads at once have one each.

    Args:
        spec: Whose copies it feeds first of all.
        chunk_bytes: Largest read.
        chunks: How many there will be about: a small load needs few slots.
        readers: Threads that fill slots.

    Raises:
        HostMemoryError: The memory cannot be had, or not be pinned.
        DeviceError: The runtime refuses.
    """
    slot_bytes = chunk_bytes + PAGE_BYTES
    count = max(2, min(_SLOTS_A_READER * readers, chunks, _RING_BYTES // slot_bytes))
    device = open_device(spec)
    with _lock:
        ring = _idle.pop(spec, None)
    if ring is not None and (ring.slot_bytes < slot_bytes or ring.count < count):
        ring.close()
        ring = None
    if ring is None:
        ring = Ring(device, slot_bytes, count)
    try:
        yield ring
    except BaseException:
        ring.close()  # a thread that did not end may still write to it
        raise
    with _lock:
        surplus = _idle.pop(spec, None)
        _idle[spec] = ring
    if surplus is not None:
        surplus.close()


def release_staging(devices: Iterable[object] | None = None) -> None:
    """Give back the pinned memory that this process keeps for its next load onto a device.

    Args:
        devices: Of which, such as ``npu:0``; of all where not given.

    Raises:
        ConfigError: A name is no device's.
    """
    specs = None if devices is None else [DeviceSpec.parse(str(device)) for device in devices]
    with _lock:
        chosen = list(_idle) if specs is None else specs
        rings = [_idle.pop(spec) for spec in chosen if spec in _idle]
    for ring in rings:
        ring.close()


def _forget() -> None:
    """A forked child has neither its parent's devices nor its lock."""
    global _lock
    _lock = threading.Lock()
    _devices.clear()
    _idle.clear()


os.register_at_fork(after_in_child=_forget)

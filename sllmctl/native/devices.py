"""Devices, the staging memory that feeds them, and slices of host memory on their way there."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

from sllmctl._native import ffi, lib
from sllmctl.native.calls import CLOSE_TIMEOUT_MS, call_aside, check, owned, wait_in_slices


class _Owned:
    """A handle of the library, given back when the last who uses it lets go."""

    __slots__ = ("_out",)

    _out: Any

    @property
    def _handle(self) -> Any:
        return ffi.NULL if self._out is None else self._out[0]

    def close(self) -> None:
        """Give it back; a job that still uses it keeps it for as long."""
        self._out = None

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


T = TypeVar("T", bound=_Owned)


class Device(_Owned):
    """A device that loads copy to. It ends with the last ring and job that use it.

    Args:
        kind: A backend: "cpu", "npu" or "cuda".
        ordinal: Which of its devices, counted as the runtime counts those it may see.

    Raises:
        DeviceUnavailable: There is no such device, or its runtime library is missing.
        DeviceError: The runtime refused it.
    """

    __slots__ = ("kind", "ordinal")

    def __init__(self, kind: str, ordinal: int = 0) -> None:
        out, error = owned("sllm_device", lib.sllm_device_close), ffi.new("sllm_error *")
        name = kind.encode()
        check(call_aside(lambda: lib.sllm_device_open(name, ordinal, out, error)), error)
        self._out = out
        self.kind = kind
        self.ordinal = ordinal


class Ring(_Owned):
    """Staging slots between files and a device, pinned where the backend pins.

    One job at a time uses a ring, and one after the other may: pinning takes time. It ends with
    the last job that uses it.

    Args:
        device: Whose copies the slots feed.
        slot_bytes: Size of one: a job's ``chunk_bytes`` and `PAGE_BYTES` more; a multiple of that.
        count: How many, 2 to 1024.

    Raises:
        HostMemoryError: The memory cannot be had, or not be pinned.
        DeviceError: The runtime refused.
    """

    __slots__ = ("count", "slot_bytes")

    def __init__(self, device: Device, slot_bytes: int, count: int) -> None:
        out = owned("sllm_ring", lib.sllm_ring_destroy, slot_bytes * count)
        error, keep = ffi.new("sllm_error *"), device._out

        def create() -> int:
            handle = ffi.NULL if keep is None else keep[0]
            return int(lib.sllm_ring_create(handle, slot_bytes, count, out, error))

        check(call_aside(create), error)
        self._out = out
        self.slot_bytes = slot_bytes
        self.count = count


class Registered(_Owned):
    """A file in memory that devices may copy from where it is mapped, past any ring.

    It ends with the last job that uses it. For measuring: no load makes one by itself.

    Args:
        device: Of a backend that can, which is "cuda"; it serves all devices of that.
        fd: Of the file, whose size must stay as it is; may be closed afterwards.

    Raises:
        NativeError: The backend cannot, or the file cannot be mapped.
        DeviceError: The runtime refused.
    """

    __slots__ = ()

    def __init__(self, device: Device, fd: int) -> None:
        out = owned("sllm_registered", lib.sllm_registered_destroy)
        error, keep = ffi.new("sllm_error *"), device._out

        def create() -> int:
            handle = ffi.NULL if keep is None else keep[0]
            return int(lib.sllm_registered_create(handle, fd, out, error))

        check(call_aside(create), error)
        self._out = out


class Gather:
    """Strided slices of host memory, copied to a device through a ring.

    What a tensor-parallel rank needs of a weight moves, and nothing else; and no memory but the
    ring's ever takes part in a device's copy. It works on the calling thread, which has the device
    as its current one, and never changes that.

    Args:
        device: Where the slices go.
        ring: Of the same backend; no job and no other gather uses it meanwhile.
        stream: The stream to copy on, as the runtime has it: torch's ``npu_stream`` or
            ``cuda_stream``. Copies come after the work that is in it, and before what comes later.
            0 for a stream of the gather's own.

    Raises:
        NativeError: The thread is on another device, or the ring of another backend.
        DeviceError: The runtime refused.
    """

    __slots__ = ("__weakref__", "_end", "_ended", "_handle")

    def __init__(self, device: Device, ring: Ring, *, stream: int = 0) -> None:
        out, error = owned("sllm_gather", _close), ffi.new("sllm_error *")
        check(lib.sllm_gather_open(device._handle, ring._handle, stream, out, error), error)
        self._handle = out[0]
        self._ended: bool | None = None
        self._end = weakref.finalize(self, _end_gather, out)

    def copy(
        self,
        target: int,
        source: int,
        *,
        rows: int,
        row_bytes: int,
        source_stride_bytes: int,
        timeout_s: float = 60,
    ) -> None:
        """Start the copy of a slice; rows lie without gaps on the device.

        What it raises, Ctrl-C included, closes the gather.

        Args:
            target: Device address of the first row.
            source: Host address of the first row; free again when this returns.
            rows: How many.
            row_bytes: Length of each.
            source_stride_bytes: From one row's start to the next one's; 0 repeats a row.
            timeout_s: Without a free slot for so long, the device has stalled.

        Raises:
            DeviceError: The runtime refused, or stalled.
            NativeError: It is no slice.
        """
        error = ffi.new("sllm_error *")
        address = ffi.cast("void *", source)
        try:
            wait_in_slices(
                lambda timeout_ms: lib.sllm_gather_copy(
                    self._handle,
                    target,
                    address,
                    rows,
                    row_bytes,
                    source_stride_bytes,
                    timeout_ms,
                    error,
                ),
                timeout_s,
                error,
                lambda: int(lib.sllm_gather_started(self._handle)),
            )
        except BaseException:
            self.close()
            raise

    def synchronize(self, timeout_s: float = 60) -> None:
        """Wait until every slice is on the device.

        Raises:
            DeviceError: A copy failed, or the device has stalled for ``timeout_s``.
        """
        error = ffi.new("sllm_error *")
        wait_in_slices(
            lambda timeout_ms: lib.sllm_gather_synchronize(self._handle, timeout_ms, error),
            timeout_s,
            error,
        )

    def close(self) -> bool:
        """End it, after the copies under way; on any thread, whatever its current device.

        Returns:
            Whether it ended within 0.3 s. If not, the ring stays until the process ends.
        """
        self._handle = ffi.NULL
        if self._ended is None:
            self._ended = False  # also after a Ctrl-C, when nobody knows
            self._ended = self._end() is not False
        return self._ended

    def __enter__(self) -> Gather:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(handle: Any) -> bool:
    return bool(lib.sllm_gather_close(handle, CLOSE_TIMEOUT_MS, ffi.NULL) == lib.SLLM_OK)


def _end_gather(out: Any) -> bool:
    handle, out[0] = out[0], ffi.NULL
    return _close(handle)

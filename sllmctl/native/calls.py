"""What every call of the native library needs: its exceptions, and waits that Ctrl-C ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from sllmctl import errors
from sllmctl._native import ffi, lib

WAIT_SLICE_MS = 200
CLOSE_TIMEOUT_MS = 300

EXCEPTIONS: dict[int, type[errors.NativeError]] = {
    lib.SLLM_E_INVALID: errors.NativeError,
    lib.SLLM_E_NOMEM: errors.HostMemoryError,
    lib.SLLM_E_IO: errors.ReadError,
    lib.SLLM_E_TRUNCATED: errors.ReadError,
    lib.SLLM_E_CHANGED: errors.ReadError,
    lib.SLLM_E_CANCELLED: errors.NativeError,
    lib.SLLM_E_TIMEOUT: errors.NativeError,
    lib.SLLM_E_NO_DEVICE: errors.DeviceUnavailable,
    lib.SLLM_E_DEVICE: errors.DeviceError,
    lib.SLLM_E_UNSUPPORTED: errors.NativeError,
    lib.SLLM_E_FORKED: errors.NativeError,
    lib.SLLM_E_BUSY: errors.NativeError,
}

HINTS: dict[int, str] = {
    lib.SLLM_E_IO: "run `sllmctl verify` on the checkpoint to find every damaged shard",
    lib.SLLM_E_TRUNCATED: "the file is shorter than its header says: copy or convert it again",
    lib.SLLM_E_CHANGED: "replace checkpoints by rename, never in place, and load again",
    lib.SLLM_E_NOMEM: "free some memory, or raise the limit of the process or its container",
    lib.SLLM_E_NO_DEVICE: "run `sllmctl doctor`: it says what a device lacks here",
    lib.SLLM_E_DEVICE: "run `sllmctl doctor`: it looks at device, driver and runtime library",
    lib.SLLM_E_FORKED: "start worker processes with `spawn`, and open devices in them",
    lib.SLLM_E_TIMEOUT: "the disk, its server or the device does not answer: look at `dmesg`",
}


def check(status: int, error: Any) -> None:
    """Raise the exception of a failed call."""
    if status == lib.SLLM_OK:
        return
    kind = EXCEPTIONS.get(status, errors.NativeError)
    exc = kind(
        ffi.string(error.message).decode("utf-8", "replace"),
        hint=HINTS.get(status),
        status=status,
        os_errno=error.os_errno,
        device_code=error.device_code,
    )
    if isinstance(exc, OSError):
        exc.errno = error.os_errno or None
    raise exc


def owned(kind: str, destroy: Callable[[Any], object], nbytes: int = 0) -> Any:
    """What a call that makes a handle writes it to. The handle ends with it, and no Ctrl-C comes
    between the two: set to NULL, it has given the handle away.

    Args:
        kind: The handle's type.
        destroy: Ends one; NULL is fine.
        nbytes: What it holds, for the garbage collector.
    """
    return ffi.gc(ffi.new(f"{kind} **"), lambda out: out[0] and destroy(out[0]), nbytes)


def call_aside(call: Callable[[], int]) -> int:
    """Make a call that may take minutes on a thread, so that Ctrl-C is answered meanwhile: the
    thread then ends with the call, and what it made is given back."""
    answer: Future[int] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as exc:
            answer.set_exception(exc)

    try:
        threading.Thread(target=run, name="sllmctl-open", daemon=True).start()
    except RuntimeError:  # no thread can be had
        return call()
    while not wait([answer], WAIT_SLICE_MS / 1000).done:
        pass
    return answer.result()


def wait_in_slices(
    call: Callable[[int], int],
    timeout_s: float,
    error: Any,
    moved: Callable[[], int] = lambda: 0,
) -> None:
    """Repeat a call that answers "not yet", so that Ctrl-C is answered between.

    Args:
        call: It takes the milliseconds it may last.
        timeout_s: For the call to end, or ``moved`` to change.
        error: What the call fills.
        moved: How far it is.
    """
    deadline, before = time.monotonic() + timeout_s, moved()
    status = lib.SLLM_E_BUSY
    while status == lib.SLLM_E_BUSY:
        if (now := moved()) != before:
            deadline, before = time.monotonic() + timeout_s, now
        left_ms = int((deadline - time.monotonic()) * 1000)
        if left_ms < 0:
            raise errors.DeviceError(
                f"the device has not copied anything for {timeout_s:g} s",
                hint=HINTS[lib.SLLM_E_DEVICE],
                status=lib.SLLM_E_TIMEOUT,
            )
        status = call(min(left_ms, WAIT_SLICE_MS))
    check(status, error)


def abi_version() -> int:
    """The interface version that the library was compiled with."""
    return int(lib.sllm_abi_version())


def status_name(status: int) -> str:
    """The name of an ``SLLM_E_*`` code."""
    return ffi.string(lib.sllm_status_name(status)).decode()

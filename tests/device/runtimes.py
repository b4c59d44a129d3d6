"""The few calls of a device runtime that figures need, by ctypes: what the backend has loaded."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import byref, c_int32, c_size_t, c_void_p
from typing import Any

HOST_TO_DEVICE = 1
DEVICE_TO_HOST = 2
HUGE_PAGES_FIRST = 0
PORTABLE = 1


def _already_loaded(*names: str) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        except OSError:
            continue
    raise SystemExit(f"none of {', '.join(names)} is loaded")


class Runtime:
    """A device of a runtime, current on the calling thread, and a stream of its own."""

    def __init__(self, lib: ctypes.CDLL, prefix: str, ordinal: int) -> None:
        self._lib = lib
        self._prefix = prefix
        self.call("SetDevice", c_int32(ordinal))
        self.stream = self.new(
            "StreamCreate" if prefix == "cuda" else "CreateStream"  # an order of words each
        )

    @property
    def emulated(self) -> bool:
        """Whether no hardware is behind it."""
        return hasattr(self._lib, "aclemuStat")

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function, and stop where it fails."""
        function: Callable[..., int] = getattr(self._lib, self._prefix + name)
        code = function(*arguments)
        if code != 0:
            raise SystemExit(f"{self._prefix}{name} failed with {code}")

    def new(self, name: str, *arguments: Any) -> c_void_p:
        """Call what gives an address or a handle."""
        out = c_void_p()
        self.call(name, byref(out), *arguments)
        return out

    def version(self) -> str:
        """What the runtime calls itself."""
        raise NotImplementedError

    def allocate(self, nbytes: int) -> c_void_p:
        """Device memory."""
        raise NotImplementedError

    def pin(self, nbytes: int) -> c_void_p:
        """Pinned host memory."""
        raise NotImplementedError

    def free(self, memory: c_void_p) -> None:
        """Give device memory back."""
        self.call("Free", memory)

    def unpin(self, memory: c_void_p) -> None:
        """Give pinned memory back."""
        self.call("FreeHost", memory)

    def copy(self, target: int, source: c_void_p, nbytes: int) -> None:
        """Start a copy to the device."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait for the copies."""
        raise NotImplementedError

    def read(self, source: int, nbytes: int) -> bytes:
        """What the device holds."""
        raise NotImplementedError


class Ascend(Runtime):
    """AscendCL."""

    def __init__(self, ordinal: int) -> None:
        super().__init__(_already_loaded("libascendcl.so", "libacl_rt.so"), "aclrt", ordinal)

    def version(self) -> str:
        if hasattr(self._lib, "aclsysGetVersionStr"):
            text = ctypes.create_string_buffer(128)
            if self._lib.aclsysGetVersionStr(b"runtime", text) == 0:
                return f"CANN runtime {text.value.decode()}"
        numbers = [c_int32() for _ in range(3)]
        self.call("GetVersion", *map(byref, numbers))
        return "AscendCL interface " + ".".join(str(number.value) for number in numbers)

    def allocate(self, nbytes: int) -> c_void_p:
        return self.new("Malloc", c_size_t(nbytes), HUGE_PAGES_FIRST)

    def pin(self, nbytes: int) -> c_void_p:
        return self.new("MallocHost", c_size_t(nbytes))

    def copy(self, target: int, source: c_void_p, nbytes: int) -> None:
        size = c_size_t(nbytes)
        self.call("MemcpyAsync", c_void_p(target), size, source, size, HOST_TO_DEVICE, self.stream)

    def synchronize(self) -> None:
        self.call("SynchronizeStream", self.stream)

    def read(self, source: int, nbytes: int) -> bytes:
        place = ctypes.create_string_buffer(nbytes)
        size = c_size_t(nbytes)
        self.call("Memcpy", place, size, c_void_p(source), size, DEVICE_TO_HOST)
        return place.raw


class Cuda(Runtime):
    """The CUDA runtime."""

    def __init__(self, ordinal: int) -> None:
        names = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
        super().__init__(_already_loaded(*names), "cuda", ordinal)

    def version(self) -> str:
        number = c_int32()
        self.call("RuntimeGetVersion", byref(number))
        return f"CUDA runtime {number.value // 1000}.{number.value % 1000 // 10}"

    def allocate(self, nbytes: int) -> c_void_p:
        return self.new("Malloc", c_size_t(nbytes))

    def pin(self, nbytes: int) -> c_void_p:
        return self.new("HostAlloc", c_size_t(nbytes), PORTABLE)

    def copy(self, target: int, source: c_void_p, nbytes: int) -> None:
        size = c_size_t(nbytes)
        self.call("MemcpyAsync", c_void_p(target), source, size, HOST_TO_DEVICE, self.stream)

    def synchronize(self) -> None:
        self.call("StreamSynchronize", self.stream)

    def read(self, source: int, nbytes: int) -> bytes:
        place = ctypes.create_string_buffer(nbytes)
        self.call("Memcpy", place, c_void_p(source), c_size_t(nbytes), DEVICE_TO_HOST)
        return place.raw


RUNTIMES: dict[str, Callable[[int], Runtime]] = {"npu": Ascend, "cuda": Cuda}

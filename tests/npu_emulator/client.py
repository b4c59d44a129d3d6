"""The emulated runtime seen through ctypes: for its own tests, without torch."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

MIB = 1 << 20
H2H, H2D, D2H, D2D = range(4)

_ARGUMENTS = {
    "aclrtMalloc": (POINTER(c_void_p), c_size_t, c_int),
    "aclrtMallocHost": (POINTER(c_void_p), c_size_t),
    "aclrtFree": (c_void_p,),
    "aclrtFreeHost": (c_void_p,),
    "aclrtMemcpy": (c_void_p, c_size_t, c_void_p, c_size_t, c_int),
    "aclrtMemcpyAsync": (c_void_p, c_size_t, c_void_p, c_size_t, c_int, c_void_p),
    "aclrtSynchronizeStream": (c_void_p,),
    "aclrtSynchronizeStreamWithTimeout": (c_void_p, c_int32),
    "aclrtDestroyStream": (c_void_p,),
    "aclrtRecordEvent": (c_void_p, c_void_p),
    "aclrtStreamWaitEvent": (c_void_p, c_void_p),
    "aclrtDestroyEvent": (c_void_p,),
    "aclrtHostRegisterV2": (c_void_p, c_uint64, c_uint32),
    "aclrtIpcMemGetExportKey": (c_void_p, c_size_t, c_char_p, c_size_t, c_uint64),
    "aclrtIpcMemImportByKey": (POINTER(c_void_p), c_char_p, c_uint64),
    "aclrtIpcMemClose": (c_char_p,),
}


class Runtime:
    """The library, started, with device 0 set on this thread where there is one."""

    def __init__(self, path: str) -> None:
        self.lib = ctypes.CDLL(path)
        for name, arguments in _ARGUMENTS.items():
            if hasattr(self.lib, name):
                getattr(self.lib, name).argtypes = arguments
        self.lib.aclGetRecentErrMsg.restype = c_char_p
        self.lib.aclrtGetSocName.restype = c_char_p
        self.lib.aclemuStat.restype = c_uint64
        self.lib.aclemuStat.argtypes = (c_char_p,)
        self.lib.aclInit(None)
        self.lib.aclrtSetDevice(0)

    def new(self, name: str, *arguments: object) -> int:
        """Call what gives a handle or an address, and demand that it does."""
        out = c_void_p()
        code = getattr(self.lib, name)(ctypes.byref(out), *arguments)
        assert code == 0, (name, code)
        return int(out.value or 0)

    def stat(self, name: str) -> int:
        return int(self.lib.aclemuStat(name.encode()))

"""The emulator keeps AscendCL's rules, as far as a loader meets them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tests.npu_emulator.build import CANN, build
from tests.npu_emulator.client import D2H, H2D, H2H, MIB, Runtime

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulator"), flags=["-O1"])


def run(library: Path, script: str, **environment: str) -> str:
    """What a script prints that has a runtime ``a``, ``n`` bytes on the host and on a device."""
    head = """
        import ctypes, time
        from tests.npu_emulator.client import *
        n = MIB
        a = Runtime(%r)
        if a.lib.aclrtSetDevice(0) == 0:
            d, h = a.new("aclrtMalloc", n, 0), a.new("aclrtMallocHost", n)
            s = a.new("aclrtCreateStream")
        def copy(source=None):
            return a.lib.aclrtMemcpyAsync(d, n, source or h, n, H2D, s)
    """
    code = textwrap.dedent(head) % str(library) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_copies_are_ordered_threads_have_contexts_and_errors_have_words(library: Path) -> None:
    a = Runtime(str(library))
    lib = a.lib
    assert lib.aclInit(None) == 100002
    assert lib.aclrtSetDevice(99) == 107001
    assert b"107001" in lib.aclGetRecentErrMsg()
    assert lib.aclGetRecentErrMsg() is None
    n = MIB
    host, back, device = (
        a.new("aclrtMallocHost", n),
        a.new("aclrtMallocHost", n),
        a.new("aclrtMalloc", n, 0),
    )
    stream = a.new("aclrtCreateStream")
    ctypes.memset(host, 7, n)
    assert lib.aclrtMemcpyAsync(device, n, host, n, H2D, stream) == 0
    assert lib.aclrtMemcpyAsync(back, n, device, n, D2H, stream) == 0
    assert lib.aclrtSynchronizeStream(stream) == 0
    assert ctypes.string_at(back, n) == b"\7" * n
    assert a.stat("async_pinned") == 2
    # arguments that contradict each other
    assert lib.aclrtMemcpyAsync(device, n - 1, host, n, H2D, stream) == 107000
    assert lib.aclrtMemcpyAsync(device, n, host, n, D2H, stream) == 107000
    assert lib.aclrtMemcpyAsync(back, n, host, n, H2H, stream) == 207000
    assert lib.aclrtMemcpyAsync(None, n, host, n, H2D, stream) == 100000
    assert lib.aclrtFree(device + 64) == 107000
    assert lib.aclrtSynchronizeStream(12345) == 107017
    # a second thread has no context; a stream of device 0 is refused under device 1
    codes: list[int] = []

    def other_thread() -> None:
        codes.append(lib.aclrtSynchronizeStream(stream))
        for number in (1, 0):
            assert lib.aclrtSetDevice(number) == 0
            codes.append(lib.aclrtSynchronizeStream(stream))

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert codes == [107002, 107003, 0]
    # events order streams
    second, event = a.new("aclrtCreateStream"), a.new("aclrtCreateEvent")
    assert lib.aclrtRecordEvent(event, stream) == 0
    assert lib.aclrtStreamWaitEvent(second, event) == 0
    assert lib.aclrtSynchronizeStream(second) == 0
    assert lib.aclrtHostRegisterV2(host + 4096 - host % 4096, 4096, 0x10000000) == 107000
    for handle in (stream, second):
        assert lib.aclrtDestroyStream(handle) == 0
    assert lib.aclrtDestroyEvent(event) == 0
    assert lib.aclrtFree(device) == 0
    assert lib.aclrtFree(device) == 107000
    for memory in (host, back):
        assert lib.aclrtFreeHost(memory) == 0
    live = ("streams", "events", "pinned_bytes", "used0", "violations", "busy_streams_destroyed")
    assert [a.stat(name) for name in live] == [0] * len(live)


def test_the_host_faults_on_device_memory(library: Path) -> None:
    script = f"""
        import ctypes
        from tests.npu_emulator.client import Runtime
        ctypes.string_at(Runtime({str(library)!r}).new("aclrtMalloc", 64, 0), 1)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGSEGV


def test_another_process_can_import_memory_by_its_key(library: Path) -> None:
    script = """
        key = ctypes.create_string_buffer(65)
        ctypes.memset(h, 65, n)
        assert a.lib.aclrtMemcpy(d, n, h, n, H2D) == 0
        assert a.lib.aclrtIpcMemGetExportKey(d, n, key, 65, 1) == 0
        import subprocess, sys
        importer = '''
        import ctypes, sys
        from tests.npu_emulator.client import *
        a, b = Runtime(sys.argv[1]), ctypes.create_string_buffer(MIB)
        d = a.new("aclrtIpcMemImportByKey", sys.argv[2].encode(), 0)
        assert a.lib.aclrtMemcpy(b, MIB, d, MIB, D2H) == 0 and b.raw == b"A" * MIB
        ctypes.memset(b, 66, MIB)
        assert a.lib.aclrtMemcpy(d, MIB, b, MIB, H2D) == 0
        assert a.lib.aclrtIpcMemClose(sys.argv[2].encode()) == 0
        '''
        import textwrap
        subprocess.run([sys.executable, "-c", textwrap.dedent(importer), LIBRARY, key.value],
                       check=True)
        assert a.lib.aclrtMemcpy(h, n, d, n, D2H) == 0
        print(ctypes.string_at(h, n) == b"B" * n, a.stat("violations"))
    """
    assert run(library, f"LIBRARY = {str(library)!r}\n" + textwrap.dedent(script)) == "True 0"


RULES = [
    pytest.param(
        {"ACLEMU_DELAY_US": "20000", "ACLEMU_CHECK_SRC": "1"},
        """
        ctypes.memset(h, 1, n)
        copy()
        ctypes.memset(h, 2, n)
        a.lib.aclrtSynchronizeStream(s)
        print(a.stat("violations"))
        """,
        "1",
        id="a source that is written to before its copy has run is seen",
    ),
    pytest.param(
        {"ACLEMU_DELAY_US": "20000"},
        """
        copy()
        a.lib.aclrtFree(d)
        a.lib.aclrtSynchronizeStream(s)
        print(a.stat("violations"))
        """,
        "1",
        id="device memory that is freed under a copy is seen",
    ),
    pytest.param(
        {"ACLEMU_FAIL": "aclrtMemcpyAsync:2:507899"},
        "print([copy() for _ in range(3)])",
        "[0, 507899, 0]",
        id="a call fails on demand",
    ),
    pytest.param(
        {"ACLEMU_FAIL": "async:aclrtMemcpyAsync:1:507053"},
        "print(copy(), a.lib.aclrtSynchronizeStream(s))",
        "0 507053",
        id="a copy that fails on the device is told of when the stream is synchronized",
    ),
    pytest.param(
        {"ACLEMU_DELAY_US": "500000"},
        "print(copy(), a.lib.aclrtSynchronizeStreamWithTimeout(s, 20))",
        "0 507046",
        id="a wait for a stream ends with its time",
    ),
    pytest.param(
        {},
        """
        b = ctypes.create_string_buffer(bytes([5]) * n, n)
        print(copy(ctypes.addressof(b)), a.stat("async_pageable"))
        """,
        "0 1",
        id="pageable memory makes a copy synchronous",
    ),
    pytest.param(
        {"ACLEMU_PAGEABLE": "undefined"},
        """
        b = ctypes.create_string_buffer(n)
        copy(ctypes.addressof(b))
        a.lib.aclrtSynchronizeStream(s)
        print(a.stat("violations"))
        """,
        "1",
        id="pageable memory is a violation under CANN 8.0",
    ),
    pytest.param(
        {"ACLEMU_ALIGN": "64"},
        """
        a.lib.aclrtMemcpyAsync(d + 8, n - 64, h, n - 64, H2D, s)
        a.lib.aclrtSynchronizeStream(s)
        print(a.stat("violations"))
        """,
        "1",
        id="an address that is not aligned is a violation under CANN 8.0",
    ),
    pytest.param(
        {"ACLEMU_HBM_MB": "8"},
        "print(a.lib.aclrtMalloc(ctypes.byref(c_void_p()), 16 * MIB, 0))",
        "207001",
        id="device memory ends",
    ),
    pytest.param(
        {"ACLEMU_DEVICES": "0"},
        "print(a.lib.aclrtGetDeviceCount(ctypes.byref(c_uint32())), a.lib.aclrtGetSocName())",
        "207004 None",
        id="there may be no device",
    ),
]


@pytest.mark.parametrize(("environment", "script", "expected"), RULES)
def test_a_rule_of_the_runtime_holds(
    library: Path, environment: dict[str, str], script: str, expected: str
) -> None:
    assert run(library, script, **environment) == expected


def test_an_older_release_lacks_newer_names(tmp_path: Path) -> None:
    names = {
        "aclrtSynchronizeStreamWithTimeout": "8.0",
        "aclsysGetCANNVersion": "8.1",
        "aclrtMemcpyBatchAsync": "8.3",
        "aclsysGetVersionStr": "8.5",
    }
    releases = list(CANN)
    for release in ("8.0", "8.3"):
        lib = ctypes.CDLL(str(build(tmp_path / release, cann=release, flags=["-O0"])))
        there = {name for name in names if hasattr(lib, name)}
        at = releases.index(release)
        assert there == {name for name, since in names.items() if releases.index(since) <= at}

"""The native library as Python sees it: errors, lifetimes, interruption, fork."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sllmctl import errors, native
from sllmctl._native import ffi, lib
from sllmctl.native import calls
from sllmctl.native import job as jobs

HEADER = (Path(__file__).parents[2] / "native" / "include" / "sllm.h").read_text()
MIB = 2**20


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


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return True
    return False


def run_script(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---- errors


def test_every_status_of_the_header_is_in_the_library_and_has_its_exception() -> None:
    in_header = set(re.findall(r"^ +(SLLM_E_\w+) =", HEADER, flags=re.MULTILINE))
    in_library = {name for name in dir(lib) if name.startswith("SLLM_E_")}
    assert in_library == in_header
    assert set(calls.EXCEPTIONS) == {getattr(lib, name) for name in in_library}
    assert all(issubclass(kind, errors.NativeError) for kind in calls.EXCEPTIONS.values())
    assert {native.status_name(getattr(lib, name)) for name in in_library} == in_library


def test_the_library_is_of_the_version_of_the_header() -> None:
    version = re.search(r"#define SLLM_ABI_VERSION (\d+)", HEADER)
    assert version is not None
    assert native.abi_version() == int(version[1]) == lib.SLLM_ABI_VERSION


@pytest.mark.parametrize("status", sorted(calls.EXCEPTIONS))
def test_a_failure_carries_its_numbers_and_its_line(status: int) -> None:
    error = ffi.new("sllm_error *")
    error.status, error.os_errno, error.device_code = status, errno.EIO, 507018
    error.message = "cannot read `\udcff`".encode("utf-8", "surrogateescape")
    with pytest.raises(calls.EXCEPTIONS[status]) as caught:
        calls.check(status, error)
    assert caught.value.status == status
    assert caught.value.os_errno == errno.EIO
    assert caught.value.device_code == 507018
    assert str(caught.value) == "cannot read `\N{REPLACEMENT CHARACTER}`"
    if isinstance(caught.value, OSError):
        assert caught.value.errno == errno.EIO


def test_a_read_error_is_an_os_error_that_names_the_file() -> None:
    with pytest.raises(OSError, match=r"/no\?where") as caught:
        native.probe_file(10**6, "/no\nwhere", 0, 1)
    assert isinstance(caught.value, errors.ReadError)
    assert caught.value.errno == caught.value.os_errno == errno.EBADF
    assert caught.value.status == lib.SLLM_E_IO


def test_an_extent_past_the_end_names_file_and_bytes(shard: tuple[int, str, bytes]) -> None:
    fd, path, data = shard
    memory = native.Memory.create(len(data) + 1)
    extents = [native.Extent(0, 0, len(data) + 1, memory.address)]
    with pytest.raises(errors.ReadError, match=f"`{path}` ends at byte {len(data)}") as caught:
        native.Job([(fd, path)], extents, keep=memory)
    assert caught.value.status == lib.SLLM_E_TRUNCATED
    assert caught.value.errno is None
    assert "copy or convert it again" in (caught.value.hint or "")
    with pytest.raises(errors.ReadError, match="before byte"):
        native.Memory.map_file(fd, path, 1, len(data))


def test_a_file_that_changes_during_the_load_is_named(shard: tuple[int, str, bytes]) -> None:
    fd, path, data = shard
    memory = native.Memory.create(len(data))
    with native.Job(
        [(fd, path)], [native.Extent(0, 0, len(data), memory.address)], keep=memory
    ) as job:
        os.utime(path, (1, 1))
        with pytest.raises(errors.ReadError, match=re.escape(path)) as caught:
            finish(job)
    assert caught.value.status == lib.SLLM_E_CHANGED


def test_memory_that_cannot_be_had_is_a_memory_error() -> None:
    with pytest.raises(MemoryError) as caught:
        native.Memory.create(2**61)
    assert isinstance(caught.value, errors.HostMemoryError)
    assert caught.value.os_errno == errno.ENOMEM


def test_what_is_no_regular_file_is_refused() -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(errors.NativeError, match="not a regular file"):
            native.probe_file(read_end, "a pipe", 0, 1)
    finally:
        os.close(read_end)
        os.close(write_end)


# ---- memory


def test_memory_lives_as_long_as_its_buffer_and_no_longer() -> None:
    memory = native.Memory.create(32 * MIB)
    address, buffer = memory.address, memory.buffer
    del memory
    gc.collect()
    assert is_mapped(address)
    buffer[0:5] = b"hello"
    view = memoryview(buffer)
    del buffer
    assert bytes(view[:5]) == b"hello"
    del view
    gc.collect()
    assert not is_mapped(address)


def test_memory_lives_as_long_as_a_tensor_looks_into_it() -> None:
    memory = native.Memory.create(32 * MIB)
    address = memory.address
    tensor = torch.frombuffer(memory.buffer, dtype=torch.uint8, count=100, offset=MIB)
    del memory
    gc.collect()
    tensor.fill_(7)
    part = tensor[10:20]
    del tensor
    gc.collect()
    assert is_mapped(address)
    assert part.tolist() == [7] * 10
    del part
    gc.collect()
    assert not is_mapped(address)


def test_pages_of_destroyed_memory_are_given_back() -> None:
    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    before = resident_bytes()
    for _ in range(10):
        memory = native.Memory.create(32 * MIB)
        torch.frombuffer(memory.buffer, dtype=torch.uint8).fill_(1)
        del memory
    gc.collect()
    assert resident_bytes() - before < 64 * MIB


def test_a_view_of_a_file_is_private_and_survives_the_file(shard: tuple[int, str, bytes]) -> None:
    fd, path, data = shard
    memory = native.Memory.map_file(fd, path, 3, len(data) - 3)
    assert memory.writable
    assert bytes(memory.buffer) == data[3:]
    memory.buffer[0:1] = b"\xff"
    assert Path(path).read_bytes() == data
    Path(path).unlink()
    assert bytes(memory.buffer[1:]) == data[4:]


# ---- jobs


def test_a_job_brings_every_byte_and_says_so(shard: tuple[int, str, bytes]) -> None:
    fd, path, data = shard
    memory = native.Memory.create(len(data) - 7, 7)
    extents = [native.Extent(0, 7, len(data) - 7, memory.address)]
    with native.Job([(fd, path)], extents, keep=memory, chunk_bytes=4096, threads=3) as job:
        progress = finish(job)
        assert bytes(memory.buffer) == data[7:]
        assert progress.bytes_done == progress.bytes_total == len(data) - 7
        assert progress.bytes_disk + progress.bytes_cache == len(data) - 7
        assert job.chunks_done(0, progress.chunks_done) == b"\x01" * progress.chunks_done
        assert finish(job) == progress
        with pytest.raises(errors.NativeError):
            job.chunks_done(0, progress.chunks_done + 1)


def test_a_job_keeps_what_it_writes_to_until_it_is_closed(shard: tuple[int, str, bytes]) -> None:
    class Kept:
        memory = native.Memory.create(4 * MIB)

    fd, path, data = shard
    kept = Kept()
    gone = weakref.ref(kept)
    job = native.Job([(fd, path)], [native.Extent(0, 0, len(data), kept.memory.address)], keep=kept)
    del kept
    gc.collect()
    assert gone() is not None
    job.close()
    assert gone() is None
    job.close()
    with pytest.raises(errors.NativeError, match="not a job"):
        job.wait()


def test_a_job_that_is_dropped_or_left_by_an_error_stops(shard: tuple[int, str, bytes]) -> None:
    fd, path, data = shard
    threads = len(os.listdir("/proc/self/task"))
    memory = native.Memory.create(len(data))
    extents = [native.Extent(0, 0, len(data), memory.address)]
    job = native.Job([(fd, path)], extents, keep=memory, chunk_bytes=4096)
    del job
    with pytest.raises(ZeroDivisionError), native.Job([(fd, path)], extents, keep=memory):
        _ = 1 // 0
    gc.collect()
    assert len(os.listdir("/proc/self/task")) == threads


@pytest.fixture
def endless(tmp_path: Path) -> str:
    """A load that would take minutes: a sparse file, every part of it to the same place."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(60000 * 16 * MIB)
    return str(path)


ENDLESS_JOB = """
import os, sys
from sllmctl import native

part = 16 * 2**20
fd = os.open(sys.argv[1], os.O_RDONLY)
memory = native.Memory.create(part)
extents = [native.Extent(0, i * part, part, memory.address) for i in range(60000)]
job = native.Job([(fd, sys.argv[1])], extents, keep=memory, threads=1)
"""


def test_ctrl_c_interrupts_a_wait(endless: str) -> None:
    script = """
        try:
            with job:
                _, progress = job.wait(1)
                print("loading", flush=True)
                while True:
                    done, progress = job.wait()
                    assert not done
        except KeyboardInterrupt:
            assert progress.bytes_done < progress.bytes_total
            from sllmctl.native import job as jobs
            assert jobs._kept == {}
            assert len(os.listdir("/proc/self/task")) == 1
            print("interrupted", flush=True)
    """
    process = run_script(ENDLESS_JOB + textwrap.dedent(script), endless)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "interrupted\n", "")


def test_a_second_ctrl_c_while_a_hung_job_is_closed_frees_no_memory(
    shard: tuple[int, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def sllm_job_close(self, *_: object) -> int:
            raise KeyboardInterrupt  # where Python answers a signal that came during the call

    class Keep:
        pass

    fd, path, data = shard
    keep, memory = Keep(), native.Memory.create(len(data))
    kept = weakref.ref(keep)
    job = native.Job(
        [(fd, path)], [native.Extent(0, 0, len(data), memory.address)], keep=(keep, memory)
    )
    handle = job._handle
    finish(job)
    del keep
    with monkeypatch.context() as patch:
        patch.setattr("sllmctl.native.job.lib", Library())
        with pytest.raises(KeyboardInterrupt):
            job.close()
    assert not job.close()
    gc.collect()
    assert kept() is not None
    assert lib.sllm_job_close(handle, 60000, ffi.NULL) == lib.SLLM_OK
    jobs._kept.clear()


def test_a_thread_that_waits_while_the_interpreter_ends_its_job_is_told(
    shard: tuple[int, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, path, data = shard
    memory = native.Memory.create(len(data))
    waiting, ended, answers = threading.Event(), threading.Event(), []

    class Library:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def sllm_job_wait(self, *args: object) -> int:
            waiting.set()
            ended.wait(0.2)  # the end may not come while this is under way
            answers.append(ended.is_set())
            return int(lib.sllm_job_wait(*args))

    job = native.Job([(fd, path)], [native.Extent(0, 0, len(data), memory.address)], keep=memory)
    monkeypatch.setattr("sllmctl.native.job.lib", Library())

    def wait() -> None:
        with suppress(errors.NativeError):  # that it was cancelled
            job.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(60)
    job._end()  # as `weakref.finalize` does at exit
    ended.set()
    thread.join()
    assert answers == [False]
    with pytest.raises(errors.NativeError, match="not a job"):
        job.wait()
    with pytest.raises(errors.NativeError, match="not all there"):
        job.chunks_done(0, 1)


@pytest.mark.parametrize("kind", ["memory", "segment"])
def test_a_ctrl_c_while_a_handle_is_made_leaves_none_behind(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Library:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def sllm_memory_create(self, *arguments: object) -> int:
            assert lib.sllm_memory_create(*arguments) == lib.SLLM_OK
            made.append(int(ffi.cast("uintptr_t", lib.sllm_memory_address(arguments[2][0]))))
            raise KeyboardInterrupt

        def sllm_segment_create(self, *arguments: object) -> int:
            assert lib.sllm_segment_create(*arguments) == lib.SLLM_OK
            made.append(int(ffi.cast("uintptr_t", lib.sllm_segment_address(arguments[2][0]))))
            raise KeyboardInterrupt

    monkeypatch.setattr("sllmctl.native.memory.lib", Library())
    with pytest.raises(KeyboardInterrupt) as caught:
        native.Memory.create(64 * MIB) if kind == "memory" else native.Segment(64 * MIB)
    assert is_mapped(made[0])  # as long as the traceback refers to it
    del caught
    gc.collect()
    assert not is_mapped(made[0])


def test_a_job_that_runs_when_the_interpreter_ends_is_closed_before_its_memory(
    endless: str,
) -> None:
    script = """
        import atexit, builtins, os

        def count_threads():
            print(len(os.listdir("/proc/self/task")), flush=True)

        atexit.register(count_threads)  # the first to be registered runs last
    """
    keep = "builtins.job = job  # outlives every module\n"
    process = run_script(textwrap.dedent(script) + ENDLESS_JOB + keep, endless)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "1\n", "")


def test_a_forked_child_may_use_the_memory_but_not_the_job(
    shard: tuple[int, str, bytes],
) -> None:
    script = """
        import os, sys
        from sllmctl import errors, native
        from sllmctl._native import lib

        path, size = sys.argv[1], int(sys.argv[2])
        fd = os.open(path, os.O_RDONLY)
        memory = native.Memory.create(size)
        extents = [native.Extent(0, 0, size, memory.address)]
        job = native.Job([(fd, path)], extents, keep=memory)
        while not job.wait()[0]:
            pass
        child = os.fork()
        if child == 0:
            for call in (job.wait, lambda: job.chunks_done(0, 1)):
                try:
                    call()
                except errors.NativeError as exc:
                    assert exc.status == lib.SLLM_E_FORKED
                else:
                    raise AssertionError
            job.close()
            assert bytes(memory.buffer) == open(path, "rb").read()
            memory.buffer[0:1] = b"x"
            del memory
            sys.exit(7)
        assert os.waitpid(child, 0)[1] == 7 << 8
        assert job.wait()[0]
        job.close()
        assert bytes(memory.buffer) == open(path, "rb").read()
    """
    _, path, data = shard
    process = run_script(script, path, str(len(data)))
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "", "")

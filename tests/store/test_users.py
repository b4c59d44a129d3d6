"""Who may use a store, tried with real users and groups; and what a client can do to its memory."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sllmctl import api
from sllmctl.store.client import StoreClient
from sllmctl.store.named import NamedModel
from tests.store.conftest import RunningStore
from tests.store.test_named import MakeModel, assert_equal, bytes_of, warm

STRANGER, MEMBER, GROUP = 65533, 65532, 65531
PLAIN_MEMORY = (
    "import sllmctl.store.daemon as d, sllmctl.store.backing as b\n"
    "d.choose_backing = b.memory_files"
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try as somebody else")


@pytest.fixture
def open_to_all(tmp_path: Path) -> Iterator[Path]:
    """A directory that everybody can enter, with the models of the test in it."""
    directory = Path(tempfile.mkdtemp(prefix="sllmctl-test-", dir="/tmp"))
    directory.chmod(0o755)
    (tmp_path / "models").mkdir()
    (directory / "models").symlink_to(tmp_path / "models")
    yield directory
    shutil.rmtree(directory)


def become(user: int, groups: list[int]) -> str:
    """Python that makes the process another user's.

    The interpreter may lie where that user cannot read: import what is needed before.
    """
    return f"os.setgroups({groups}); os.setgid({user}); os.setuid({user})"


def serve_as(user: int) -> str:
    """Python that makes `sllmctl serve` another user's when it begins."""
    return (
        "import encodings.ascii, os, sllmctl.store.daemon as d; real = d.Daemon.__init__\n"
        f"d.Daemon.__init__ = lambda *a: ({become(user, []).replace(';', ',')}, real(*a))[-1]"
    )


def ask_as(user: int, groups: list[int], store: RunningStore, request: str) -> str:
    """What a client of another user is told, or the error that it meets."""
    script = (
        "import encodings.idna, json, os, sys; from pathlib import Path\n"
        f"from sllmctl.store.client import StoreClient; {become(user, groups)}\n"
        "try: print(StoreClient(Path(sys.argv[1])).ask(json.loads(sys.argv[2])))\n"
        "except Exception as exc: print('refused:', exc, exc.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(store.socket), request],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


STATUS = '{"op": "status"}'


def test_another_user_cannot_connect(
    start_store: Callable[..., RunningStore], open_to_all: Path
) -> None:
    store = start_store(directory=open_to_all)
    refused = ask_as(STRANGER, [GROUP], store, STATUS)
    assert "Permission denied" in refused and "--group" in refused
    assert "sllmctl.status/1" in ask_as(0, [], store, STATUS)


def test_members_of_the_group_may_use_names_and_nobody_else_connects(
    start_store: Callable[..., RunningStore], open_to_all: Path, make_model: MakeModel
) -> None:
    make_model("m")
    store = start_store("--group", str(GROUP), directory=open_to_all)
    assert store.socket.stat().st_mode & 0o777 == 0o660
    assert "sllmctl.status/1" in ask_as(MEMBER, [GROUP], store, STATUS)
    assert "attached" in ask_as(MEMBER, [GROUP], store, '{"op": "attach", "name": "m"}')
    assert "Permission denied" in ask_as(STRANGER, [], store, STATUS)


PEEK = f"""
import encodings.idna, os, sys, subprocess
from pathlib import Path
from sllmctl.store.client import StoreClient
{become(MEMBER, [GROUP])}
client = StoreClient(Path(sys.argv[1]))
client.send({{"op": "attach", "name": "m"}})
fds = []
while (message := client.receive())[0]["event"] != "settled":
    if message[0]["event"] == "ready":
        fds += message[1]
out, into = os.pipe()
assert all(os.splice(fd, into, 4096, offset_src=16384) == 4096 for fd in fds)
seen = b"".join(os.pread(fd, 4096, 16384) for fd in fds)
for fd in fds:
    os.close(fd)
client.close()
print(len(fds), flush=True)
sys.stdin.readline()
print(os.read(out, len(seen)) == seen)
"""


def test_pages_that_another_user_keeps_in_a_pipe_never_become_another_models(
    start_store: Callable[..., RunningStore], open_to_all: Path, make_model: MakeModel
) -> None:
    make_model("m"), make_model("secret", mib=8)
    store = start_store("--group", str(GROUP), directory=open_to_all, pool="8MiB")
    command = [sys.executable, "-c", PEEK, str(store.socket)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as member:
        assert member.stdout is not None
        assert int(member.stdout.readline()) > 1
        store.wait_for(lambda status: not status["leases"])
        for name in ("m", "secret"):  # into all the memory there is
            with StoreClient(store.socket) as client:
                request = {"op": "evict" if name == "m" else "warm", "name": name}
                client.ask(request)
                while name == "secret" and client.receive()[0]["event"] != "settled":
                    pass
        told, _ = member.communicate("go\n", timeout=60)
    assert told.strip() == "True"


SLOW_CLOSE = """
import time
from sllmctl.native import Segment
close = Segment.close
Segment.close = lambda self: (time.sleep(0.3), close(self))[1]
"""


@pytest.mark.parametrize("kind", ["tmpfs", "memfd"])
def test_memory_that_others_have_seen_is_back_before_it_is_filled_again(
    start_store: Callable[..., RunningStore], open_to_all: Path, make_model: MakeModel, kind: str
) -> None:
    """A full tmpfs has no page for a segment whose predecessor is not gone yet."""
    make_model("m", mib=12), make_model("n", mib=12, seed=1)
    before = SLOW_CLOSE + (PLAIN_MEMORY if kind == "memfd" else "")
    store = start_store("--group", str(GROUP), directory=open_to_all, pool="20MiB", before=before)
    if store.status()["pool"]["backing"] != kind:
        pytest.skip(f"this system has no {kind} with huge pages for the store")
    store.wait_for(lambda status: status["pool"]["prefaulted_bytes"] == status["pool"]["bytes"])
    for name in ("m", "n", "m"):
        for _ in range(2):  # the second is handed what the first had filled
            ask_as(MEMBER, [GROUP], store, json.dumps({"op": "attach", "name": name}))
            store.wait_for(lambda status: all(m["state"] != "loading" for m in status["models"]))
            status = store.wait_for(lambda status: not status["leases"])
            assert [m["state"] for m in status["models"] if m["name"] == name] == ["warm"]
    assert status["counters"]["evictions"] > 0


def test_a_store_of_a_plain_user_serves_root_and_hides_itself_from_its_own(
    start_store: Callable[..., RunningStore], open_to_all: Path, make_model: MakeModel
) -> None:
    own = open_to_all / "own"
    own.mkdir()
    os.chown(own, STRANGER, STRANGER)
    store = start_store(directory=own, before=serve_as(STRANGER))
    assert any("pages in a memfd" in line for line in store.greeting)
    with StoreClient(store.socket) as client:
        assert client.ask({"op": "status"})["pool"]["backing"] == "memfd"
    path = make_model("m")
    for _ in range(2):
        loaded = api.load(path, store="require", socket=store.socket)
        assert_equal(loaded.tensors, bytes_of(path))
        stats = loaded.stats
        del loaded
        gc.collect()
    assert stats.store_bytes == stats.bytes
    # Nobody of the same user looks into the daemon, or takes its descriptors.
    looking = subprocess.run(
        ["/bin/ls", f"/proc/{store.process.pid}/fd"],
        user=STRANGER,
        capture_output=True,
        check=False,
    )
    assert b"Permission denied" in looking.stderr


@pytest.mark.parametrize("kind", ["tmpfs", "memfd"])
def test_nothing_can_be_changed_through_what_a_client_receives(
    start_store: Callable[..., RunningStore], make_model: MakeModel, kind: str
) -> None:
    path = make_model("m")
    want = bytes_of(path)
    store = start_store(before=PLAIN_MEMORY if kind == "memfd" else "")
    if store.status()["pool"]["backing"] != kind:
        pytest.skip(f"this system has no {kind} with huge pages for the store")
    warm(store, "m")
    model = NamedModel(StoreClient(store.socket), "m")
    assert len(model.held) > 3
    for fd in model.held.values():
        attack(fd)
        for flags in (os.O_RDWR, os.O_WRONLY):
            try:
                again = os.open(f"/proc/self/fd/{fd}", flags)
            except OSError:
                continue
            assert kind == "memfd"  # root opens it, and the seals hold all the same
            attack(again)
            os.close(again)
    model.close()
    model.client.close()
    loaded = api.load("m", store="require", socket=store.socket, storage_path=store.storage)
    assert_equal(loaded.tensors, want)
    assert loaded.stats.store_bytes == loaded.stats.bytes
    del loaded
    gc.collect()


def attack(fd: int) -> None:
    """Everything that could change what is behind a descriptor is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    size = os.fstat(fd).st_size
    with pytest.raises(OSError, match="."):
        mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    view = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if view != ctypes.c_void_p(-1).value:  # a descriptor for writing alone has none
        assert libc.mprotect(ctypes.c_void_p(view), ctypes.c_size_t(size), 3) == -1
        assert libc.munmap(ctypes.c_void_p(view), ctypes.c_size_t(size)) == 0
    for call in (
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, 2 * size),
        lambda: os.posix_fallocate(fd, 0, 2 * size),
        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        with pytest.raises(OSError, match="."):
            call()
    punch = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    assert libc.fallocate(fd, punch, ctypes.c_long(0), ctypes.c_long(4096)) == -1

"""Machines with a store of sllmctl, and what can be wrong with it."""

from __future__ import annotations

from typing import Any

from sllmctl import __version__
from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.scenarios_store import MODEL
from tests.doctor.tree import Tree

SOCKET = "/run/sllmctl/store.sock"
SVC = Options(profiles=("base",))
WITH_MODEL = Options(profiles=("base",), model=f"/{MODEL}")
GB = 10**9


def serving(t: Tree, path: str = SOCKET, hello: dict[str, Any] | None = None, **pool: Any) -> None:
    """A store with a pool of 64 GB, half of it in use."""
    t.node(path.lstrip("/"), kind="socket")
    said = {
        "bytes": 64 * GB, "used_bytes": 32 * GB, "pinned_bytes": 0, "orphaned_bytes": 0,
        "segment_bytes": 256 << 20, "page_bytes": 2 << 20, "locked": True, "prefaulted_bytes": 0,
        **pool,
    }  # fmt: skip
    greeting = {"event": "hello", "version": 1, "sllmctl": __version__, "pid": 4242}
    t.more["stores"] = {
        path: {
            "hello": {**greeting, **(hello or {})},
            "status": {"event": "status", "pool": said, "models": []},
        }
    }


def problem(t: Tree, word: str) -> None:
    t.node(SOCKET.lstrip("/"), kind="socket")
    t.more["stores"] = {SOCKET: {"problem": word}}


def model_of(t: Tree, size: int) -> None:
    t.file(f"{MODEL}/config.json", "{}")
    t.file(f"{MODEL}/model.safetensors", b"\0" * size)


@scenario("a store of sllmctl, all in order", options=WITH_MODEL)
def good_store(t: Tree) -> None:
    serving(t)
    model_of(t, 1 << 20)


@scenario("a user's own store", options=SVC)
def users_store(t: Tree) -> None:
    t.env["XDG_RUNTIME_DIR"] = "/run/user/1001"
    serving(t, "/run/user/1001/sllmctl/store.sock")


@scenario("a store that tells its status to its own user alone", options=SVC)
def private(t: Tree) -> None:
    serving(t)
    t.more["stores"][SOCKET]["status"] = {}


@scenario("SLLMCTL_SOCKET leads nowhere", {"SVC001": "warn"}, options=SVC, says="SLLMCTL_SOCKET")
def no_socket(t: Tree) -> None:
    t.env["SLLMCTL_SOCKET"] = "/tmp/none.sock"
    serving(t)  # where a client that was told another place does not look


@scenario("a socket left over", {"SVC001": "warn"}, options=SVC, says="left over")
def stale(t: Tree) -> None:
    problem(t, "refused")


@scenario("a store of others", {"SVC001": "warn"}, options=SVC, says="may not use")
def denied(t: Tree) -> None:
    problem(t, "denied")


@scenario("a file in place of the socket", {"SVC001": "fail"}, options=SVC, says="not a socket")
def plain_file(t: Tree) -> None:
    t.file(SOCKET.lstrip("/"))


@scenario("a store that hangs", {"SVC001": "fail"}, options=SVC, says="it says nothing")
def silent(t: Tree) -> None:
    problem(t, "it says nothing")


@scenario("a store of an older release", {"SVC002": "info"}, options=SVC, says="0.0.9")
def older(t: Tree) -> None:
    serving(t, hello={"sllmctl": "0.0.9"})


@scenario("a store of another protocol", {"SVC002": "warn"}, options=SVC)
def other_protocol(t: Tree) -> None:
    serving(t, hello={"version": 2, "sllmctl": "9.0.0"})


@scenario("a pool larger than the machine", {"SVC003": "fail"}, options=SVC, says="2 TB")
def too_large(t: Tree) -> None:
    serving(t, bytes=2000 * GB)


@scenario("a pool larger than the container", {"SVC003": "fail"}, options=SVC)
def too_large_for_container(t: Tree) -> None:
    serving(t)
    t.file("sys/fs/cgroup/memory.max", str(16 << 30))
    t.file("sys/fs/cgroup/memory.current", str(1 << 30))


@scenario("a store that may be swapped out", {"SVC004": "warn"}, options=SVC)
def swappable(t: Tree) -> None:
    serving(t, locked=False)
    t.change("proc/meminfo", "SwapTotal: 0 kB", "SwapTotal: 8388608 kB")


@scenario("a store that is not locked, without swap", {"SVC004": "info"}, options=SVC)
def not_locked(t: Tree) -> None:
    serving(t, locked=False)


@scenario("pages of 64 KiB", {"SVC005": "info"}, options=SVC, says="64 KiB")
def small_pages(t: Tree) -> None:
    serving(t, page_bytes=65536)


@scenario("segments that end within a page", {"SVC005": "fail"}, options=SVC)
def odd_segments(t: Tree) -> None:
    serving(t, segment_bytes=(2 << 20) + 4096, page_bytes=65536)


@scenario("a model larger than the pool", {"SVC006": "warn"}, options=WITH_MODEL, says="2.1 MB")
def large_model(t: Tree) -> None:
    serving(t, bytes=1 << 20, used_bytes=0)
    model_of(t, 2 << 20)


@scenario("a pool full of pinned models", {"SVC006": "info"}, options=WITH_MODEL)
def pinned(t: Tree) -> None:
    serving(t, pinned_bytes=64 * GB - 4096)
    model_of(t, 1 << 20)

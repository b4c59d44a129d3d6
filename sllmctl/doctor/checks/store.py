"""SVC: the store of sllmctl itself, asked over its socket."""

from __future__ import annotations

from sllmctl import __version__
from sllmctl.core.units import format_size
from sllmctl.doctor.check import (
    Evidence,
    Finding,
    Status,
    check,
    env,
    fail,
    file,
    info,
    limit,
    ok,
    say,
    skip,
    warn,
)
from sllmctl.doctor.checks.memory import available
from sllmctl.doctor.machine import Machine
from sllmctl.store.protocol import SOCKET_VARIABLE, VERSION

_HUGE_BYTES = 2 << 20


def _pool(m: Machine) -> dict[str, int]:
    """Numbers that the store says of its pool; those that are none are left out."""
    _, answer = m.store
    pool = answer.status.get("pool") if answer else None
    found = pool.items() if isinstance(pool, dict) else ()
    return {name: value for name, value in found if isinstance(value, int)}


@check(
    "SVC001",
    title="the store of sllmctl answers",
    why="a client that does not reach the store reads the disk, which is slower, and works",
    looks_at="SLLMCTL_SOCKET, else $XDG_RUNTIME_DIR/sllmctl/store.sock and "
    "/run/sllmctl/store.sock; a store's answer to `hello` and `status`, 2 s at most",
    level=1,
    profiles="base convert",
)
def answers(m: Machine) -> Finding:
    path, answer = m.store
    if answer is None:
        said = m.env.get(SOCKET_VARIABLE)
        if said:
            return warn(
                say("SLLMCTL_SOCKET names a socket that is not there"),
                env(SOCKET_VARIABLE, said),
                fix=f"sllmctl serve --socket {said}",
            )
        return skip(say("no store runs here (`sllmctl serve` starts one)"))
    if answer.problem == "refused":
        return warn(
            say("{path} is left over from a store that has ended", path=path),
            file(path, "connection refused"),
            fix="sllmctl serve  # it replaces the old socket",
        )
    if answer.problem == "denied":
        return warn(
            say("this user may not use the store at {path}", path=path),
            file(path, "permission denied"),
            advice=say("start it with --group, and be a member of that group"),
        )
    if answer.problem == "no socket":
        return fail(
            say("{path} is not a socket", path=path),
            file(path, "not a socket"),
            fix=f"mv {path} {path}.old; sllmctl serve",
        )
    if answer.problem:
        return fail(
            say("the store does not answer: {problem}", problem=answer.problem),
            file(path, answer.problem),
            advice=say("end it, and start it again: clients keep the memory that they have"),
        )
    return ok(
        say("the store answers (sllmctl {version})", version=answer.hello.get("sllmctl", "?")),
        file(path, f"pid {answer.hello.get('pid', '?')}"),
    )


@check(
    "SVC002",
    title="the store is of this release of sllmctl",
    why="a store keeps running through an upgrade, and serves with the old code",
    looks_at="the version in the store's answer to `hello`, against this sllmctl",
    severity=Status.WARN,
    level=1,
    profiles="base convert",
    needs=("SVC001",),
)
def release(m: Machine) -> Finding:
    path, answer = m.store
    hello = answer.hello if answer else {}
    if not hello:
        return skip(say("no store answers"))
    theirs, protocol = str(hello.get("sllmctl", "?")), hello.get("version")
    if protocol == VERSION and theirs == __version__:
        return ok(say("store and client are sllmctl {version}", version=theirs))
    made = info if protocol == VERSION else warn
    return made(
        say("the store is sllmctl {theirs}, this is {ours}", theirs=theirs, ours=__version__),
        file(path, f"protocol {protocol}"),
        advice=say("end it, and start it again: clients keep the memory that they have"),
    )


@check(
    "SVC003",
    title="the store's pool fits the machine",
    why="memory is taken as models come: a pool that does not fit ends in a kill by the kernel",
    looks_at="the pool and what it holds, as the store says, against MemAvailable and the limits "
    "of the cgroups",
    level=1,
    profiles="base convert",
    needs=("SVC001",),
)
def fits(m: Machine) -> Finding:
    pool, found = _pool(m), available(m)
    if "bytes" not in pool or found is None:
        return skip(say("how much memory is free is not known"))
    held = pool.get("used_bytes", 0) + pool.get("orphaned_bytes", 0)
    missing = pool["bytes"] - max(held, pool.get("prefaulted_bytes", 0))
    free, source = found
    seen = (
        limit("pool", f"{pool['bytes']} bytes, {missing} of them not taken yet"),
        file(source, f"{free} bytes free"),
    )
    if missing > free:
        return fail(
            say(
                "the pool of {pool} needs {missing} more, and {free} are free",
                pool=format_size(pool["bytes"]),
                missing=format_size(missing),
                free=format_size(free),
            ),
            *seen,
            advice=say(
                "start the store with --mem-pool-size {size} at most",
                size=format_size(int(0.8 * (free + pool["bytes"] - missing))),
            ),
        )
    return ok(say("the pool of {pool} fits", pool=format_size(pool["bytes"])), *seen)


@check(
    "SVC004",
    title="the store's memory is locked",
    why="memory that is not locked may be swapped out, and a warm load then waits for the disk",
    looks_at="what the store says of its segments, and swap in /proc/meminfo",
    severity=Status.WARN,
    level=1,
    profiles="base convert",
    needs=("SVC001",),
)
def locked(m: Machine) -> Finding:
    _, answer = m.store
    pool = answer.status.get("pool") if answer else None
    if not isinstance(pool, dict) or not isinstance(pool.get("locked"), bool):
        return skip(say("the store does not say whether its memory is locked"))
    if pool["locked"]:
        return ok(say("the store's memory is locked"))
    return (warn if m.swap_bytes else info)(
        say("the store's memory is not locked")
        if m.swap_bytes
        else say("the store's memory is not locked, which does no harm without swap"),
        limit("locked", "false"),
        limit("swap", f"{m.swap_bytes} bytes"),
        fix="docker run --ulimit memlock=-1 ..."
        if m.in_container
        else "ulimit -l unlimited; sllmctl serve  # as a service: LimitMEMLOCK=infinity",
    )


@check(
    "SVC005",
    title="the store's memory has huge pages",
    why="small pages cost every load time: each is mapped, and missed, for itself",
    looks_at="page_bytes and segment_bytes, as the store says",
    level=1,
    profiles="base convert",
    needs=("SVC001",),
)
def pages(m: Machine) -> Finding:
    pool = _pool(m)
    segment, page = pool.get("segment_bytes", 0), pool.get("page_bytes", 0)
    if segment <= 0 or page <= 0:
        return skip(say("the store does not say how large its pages are"))
    seen = (limit("segment", f"{segment} bytes"), limit("page", f"{page} bytes"))
    if segment % page:
        return fail(
            say("segments of {segment} bytes are no multiple of a page of {page} bytes",
                segment=segment, page=page),
            *seen,
            fix="sllmctl serve --segment-size 256MiB",
        )  # fmt: skip
    if page < _HUGE_BYTES:
        switch = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
        return info(
            say("the store's memory has pages of {size} KiB", size=page >> 10),
            *seen,
            file(switch, (m.probe.read_text(switch) or "missing").strip()),
            fix=f"echo advise | sudo tee {switch}; sllmctl serve",
        )
    return ok(say("the store's memory has huge pages"), *seen)


@check(
    "SVC006",
    title="the model fits the store's pool",
    why="what does not fit is read from disk by every load; nothing is lost but time",
    looks_at="the bytes of --model against the pool, and what of it is pinned or held",
    severity=Status.WARN,
    level=1,
    profiles="base convert",
    needs=("SVC001",),
)
def model(m: Machine) -> Finding:
    size = m.model_bytes
    pool = _pool(m)
    if not size:
        return skip(say("--model was not given"))
    if "bytes" not in pool:
        return skip(say("how large the pool is, is not known"))
    seen: list[Evidence] = [
        limit("pool", f"{pool['bytes']} bytes"),
        limit("model", f"{size} bytes"),
    ]
    if size > pool["bytes"]:
        return warn(
            say("the model has {size}, the pool {pool}",
                size=format_size(size), pool=format_size(pool["bytes"])),
            *seen,
            advice=say("start the store with --mem-pool-size {size} or more",
                       size=format_size(int(size * 1.1))),
        )  # fmt: skip
    others = pool.get("pinned_bytes", 0) + pool.get("orphaned_bytes", 0)
    if size > pool["bytes"] - others:
        return info(
            say("the model fits when what is pinned or held is given up ({size})",
                size=format_size(others)),
            *seen,
        )  # fmt: skip
    return ok(say("the model fits the pool"), *seen)

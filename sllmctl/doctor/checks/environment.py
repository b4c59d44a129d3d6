"""ENV: what the environment of this process says, and whether it says one thing."""

from __future__ import annotations

import posixpath
import re
import shlex

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
    worst,
)
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.versions import cann_base

STUB = re.compile(r"/(stub|devlib)(/|$)")
_LOG_BYTES = 5 << 30
_IDS = re.compile(r"[0-9]{1,4}(,[0-9]{1,4})*")
_PYTHON = re.compile(r"/python(\d+\.\d+)/(site|dist)-packages")


@check(
    "ENV001",
    title="set_env.sh has been sourced",
    why="without it libhccl.so, libascendcl.so and the operators are not found",
    looks_at="ASCEND_HOME_PATH or ASCEND_TOOLKIT_HOME, ASCEND_OPP_PATH, and lib64 in "
    "LD_LIBRARY_PATH, as this process sees them (a service does not read ~/.bashrc)",
    needs=("CANN001", "CANN007"),
)
def sourced(m: Machine) -> Finding:
    assert m.cann is not None
    fix = f"source {m.set_env}"
    home = m.env.get("ASCEND_HOME_PATH") or m.env.get("ASCEND_TOOLKIT_HOME")
    if not home:
        startup = f"{m.probe.host.home}/.bashrc"
        there = "set_env.sh" in (m.probe.read_text(startup) or "")
        return fail(
            say(
                "CANN {version} is installed, but set_env.sh was not sourced",
                version=m.cann.version,
            ),
            env("ASCEND_HOME_PATH", "unset"),
            *([file(startup, "sources set_env.sh")] if there else []),
            fix=fix, action="env",
            advice=say("~/.bashrc sources it, which services and `docker exec` do not read")
            if there
            else None,
        )  # fmt: skip
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH"):
        value = m.env.get(name)
        if value and not m.probe.is_dir(value):
            return fail(
                say("{name} leads nowhere", name=name), env(name, value), fix=fix, action="env"
            )
    if not m.env.get("ASCEND_OPP_PATH"):
        return fail(
            say("{name} is not set", name="ASCEND_OPP_PATH"),
            env("ASCEND_OPP_PATH", "unset"),
            fix=fix, action="env",
        )  # fmt: skip
    if m.find_library("libascendcl.so") is None:
        return fail(
            say("LD_LIBRARY_PATH does not lead to libascendcl.so"),
            env("LD_LIBRARY_PATH", m.env.get("LD_LIBRARY_PATH", "unset")),
            fix=fix, action="env",
        )  # fmt: skip
    return ok(say("the environment of CANN is set"), env("ASCEND_HOME_PATH", home))


@check(
    "ENV002",
    title="all variables lead to one CANN",
    why="libraries of one version with operators of another fail far from the cause",
    looks_at="ASCEND_HOME_PATH, ASCEND_TOOLKIT_HOME, ASCEND_OPP_PATH, ASCEND_AICPU_PATH, and the "
    "first CANN in LD_LIBRARY_PATH and PYTHONPATH, links followed",
    needs=("ENV001",),
)
def one_root(m: Machine) -> Finding:
    roots: dict[str, str] = {}
    versions = {root.path: cann_base(root.version) for root in m.cann_roots}
    for name in (
        "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH", "ASCEND_AICPU_PATH",
    ):  # fmt: skip
        if (value := m.env.get(name)) and (root := m.cann_of(value)):
            roots[name] = root
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        # Any folder may be called `cann`; one without a CANN in it gives nothing away.
        found = (m.cann_of(e) for e in m.env.get(name, "").split(":") if not STUB.search(e))
        if root := next((root for root in found if root in versions), None):
            roots[name] = root
    named = {name: versions.get(root, root) for name, root in roots.items()}
    if len(set(named.values())) < 2:
        return ok(say("all variables lead to one CANN"))
    return fail(
        say("variables lead to different CANN: {versions}",
            versions=", ".join(sorted(set(named.values())))),
        *(env(name, f"{m.env[name].split(':')[0]} ({version})") for name, version in named.items()),
        fix="unset ASCEND_HOME_PATH ASCEND_TOOLKIT_HOME ASCEND_OPP_PATH ASCEND_AICPU_PATH; "
        f"source {m.set_env}  # in a new shell, without exports of your own",
        action="env",
    )  # fmt: skip


@check(
    "ENV003",
    title="ASCEND_AICPU_PATH is the root of CANN",
    why="set_env.sh sets the root; `<root>/aicpu` of older guides leads nowhere",
    looks_at="ASCEND_AICPU_PATH",
    severity=Status.WARN,
    needs=("CANN001",),
)
def aicpu(m: Machine) -> Finding:
    value = m.env.get("ASCEND_AICPU_PATH")
    if not value:
        return ok(say("{name} is not set", name="ASCEND_AICPU_PATH"))
    if value.rstrip("/").endswith("/aicpu") or not m.probe.is_dir(value):
        return warn(
            say("ASCEND_AICPU_PATH is not the root of CANN"),
            env("ASCEND_AICPU_PATH", value),
            fix=f"unset ASCEND_AICPU_PATH; source {m.set_env}",
            action="env",
        )
    return ok(say("ASCEND_AICPU_PATH is the root of CANN"), env("ASCEND_AICPU_PATH", value))


@check(
    "ENV004",
    title="no stub libraries at run time",
    why="a stub is for the linker: run with it, and aclInit fails with 100039 or 500000",
    looks_at="directories `stub` and `devlib` in LD_LIBRARY_PATH, before or without the real "
    "libascend_hal.so",
)
def stubs(m: Machine) -> Finding:
    entries = [entry for entry in m.library_path if STUB.search(entry)]
    if not entries:
        return ok(say("no stub libraries in LD_LIBRARY_PATH"))
    real = next(
        (
            i
            for i, entry in enumerate(m.library_path)
            if not STUB.search(entry) and m.probe.exists(f"{entry}/libascend_hal.so")
        ),
        None,
    )
    first = m.library_path.index(entries[0])
    seen = tuple(env("LD_LIBRARY_PATH", entry) for entry in entries)
    if real is not None and real < first:
        return info(say("stub libraries stand behind the real ones, where they do no harm"), *seen)
    return fail(
        say("stub libraries stand before the driver's own: {path}", path=entries[0]),
        *seen,
        fix="export LD_LIBRARY_PATH=$(echo $LD_LIBRARY_PATH | tr : '\\n' | "
        "grep -Ev '/(stub|devlib)(/|$)' | paste -sd:)",
        action="env",
    )


@check(
    "ENV005",
    title="LD_LIBRARY_PATH is clean",
    why="an empty entry means the current directory: whatever lies there is loaded",
    looks_at="entries of LD_LIBRARY_PATH that are empty, missing or there twice",
    severity=Status.WARN,
    profiles="base convert",
)
def library_path(m: Machine) -> Finding:
    found: list[Finding | None] = []
    if "" in m.library_path:
        found.append(
            warn(
                say("LD_LIBRARY_PATH has an empty entry, which is the current directory"),
                env("LD_LIBRARY_PATH", m.env["LD_LIBRARY_PATH"]),
                fix="export LD_LIBRARY_PATH=$(echo $LD_LIBRARY_PATH | tr -s : | sed 's/^://;s/:$//')",
                action="env",
            )
        )
    entries = [entry for entry in m.library_path if entry]
    missing = [entry for entry in entries if not m.probe.is_dir(entry)]
    reals = [m.probe.realpath(entry) for entry in entries if entry not in missing]
    twice = len(reals) - len(set(reals))
    if missing or twice:
        found.append(
            info(
                say("LD_LIBRARY_PATH: entries that lead nowhere: {missing}, that repeat: {twice}",
                    missing=len(missing), twice=twice),
                *(env("LD_LIBRARY_PATH", entry) for entry in missing[:4]),
            )
        )  # fmt: skip
    return worst(found, ok(say("LD_LIBRARY_PATH is clean")))


@check(
    "ENV006",
    title="ASCEND_RT_VISIBLE_DEVICES names cards that are there",
    why="blanks, ranges, another order or a number too high hide cards, without an error",
    looks_at="ASCEND_RT_VISIBLE_DEVICES: numbers and commas alone, ascending, below the number of "
    "cards that this process sees (a container counts from 0)",
)
def visible_devices(m: Machine) -> Finding:
    name = "ASCEND_RT_VISIBLE_DEVICES"
    value = m.env.get(name)
    if value is None:
        return ok(say("{name} is not set: all cards are visible", name=name))
    seen: list[Evidence] = [env(name, value)]
    if value == "":
        return info(say("{name} is empty: no card is visible", name=name), *seen)
    count = max(len(m.cards), len(m.smi.cards))
    wanted = card_ids(value)
    good = [n for n in wanted if not count or n < count] or ([0] if count else wanted)
    fix = f"export {name}={','.join(map(str, good))}" if good else f"unset {name}"
    if not _IDS.fullmatch(value):
        return fail(
            say("{name} must be numbers and commas: {value}", name=name, value=repr(value)),
            *seen, fix=fix, action="env",
        )  # fmt: skip
    ids = [int(n) for n in value.split(",")]
    if ids != sorted(set(ids)):
        return fail(
            say("{name} must ascend, each card once: {value}", name=name, value=value),
            *seen, fix=fix, action="env",
        )  # fmt: skip
    if count and ids[-1] >= count:
        seen.append(file("/dev", f"{count} cards"))
        return fail(
            say("{name} asks for card {id}, but they go from 0 to {last} here",
                name=name, id=ids[-1], last=count - 1),
            *seen, fix=fix, action="env",
        )  # fmt: skip
    return ok(say("{name} is {value}", name=name, value=value), *seen)


def card_ids(value: str) -> list[int]:
    """The cards that a value means, so that a correction can be offered: `0-3` is 0, 1, 2, 3."""
    spread = re.sub(
        r"(\d{1,3})\s*-\s*(\d{1,3})",
        lambda match: ",".join(str(n) for n in range(int(match[1]), int(match[2]) + 1)),
        value,
    )
    return sorted({int(n) for n in re.findall(r"\d{1,4}", spread)})


@check(
    "ENV007",
    title="the runtime's log is not a flood",
    why="debug and info logs slow every call and fill the disk",
    looks_at="ASCEND_SLOG_PRINT_TO_STDOUT, ASCEND_GLOBAL_LOG_LEVEL, ATB_LOG_LEVEL, "
    "ASDOPS_LOG_LEVEL, HCCL_ENTRY_LOG_ENABLE; the size of ASCEND_PROCESS_LOG_PATH, else of "
    "~/ascend/log",
    severity=Status.WARN,
)
def log_flood(m: Machine) -> Finding:
    found = []
    if m.env.get("ASCEND_SLOG_PRINT_TO_STDOUT") == "1":
        found.append(env("ASCEND_SLOG_PRINT_TO_STDOUT", "1"))
    if m.env.get("ASCEND_GLOBAL_LOG_LEVEL") in ("0", "1"):
        found.append(env("ASCEND_GLOBAL_LOG_LEVEL", m.env["ASCEND_GLOBAL_LOG_LEVEL"]))
    for name in ("ATB_LOG_LEVEL", "ASDOPS_LOG_LEVEL"):
        if m.env.get(name, "").upper() in ("TRACE", "DEBUG", "INFO"):
            found.append(env(name, m.env[name]))
    if m.env.get("HCCL_ENTRY_LOG_ENABLE") == "1":
        found.append(env("HCCL_ENTRY_LOG_ENABLE", "1"))
    if found:
        names = ", ".join(f"{item.name}={item.value}" for item in found)
        return warn(
            say("logs are set to a flood: {names}", names=names),
            *found,
            fix="unset ASCEND_SLOG_PRINT_TO_STDOUT ATB_LOG_LEVEL ASDOPS_LOG_LEVEL "
            "HCCL_ENTRY_LOG_ENABLE; export ASCEND_GLOBAL_LOG_LEVEL=3",
            action="env",
        )
    path = m.env.get("ASCEND_PROCESS_LOG_PATH") or f"{m.probe.host.home}/ascend/log"
    if m.probe.bytes_below(path, _LOG_BYTES) > _LOG_BYTES:
        return info(
            say("old logs in {path} take more than {size} GB", path=path, size=_LOG_BYTES >> 30),
            limit(path, f"more than {_LOG_BYTES} bytes"),
            fix=f"find {shlex.quote(path)} -type f -mtime +7 -delete",
        )
    return ok(say("logs are at their usual level"))


@check(
    "ENV008",
    title="PYTHONPATH leads to CANN's Python side",
    why="operators are compiled by Python modules (tbe, te) that live in CANN",
    looks_at="python/site-packages of CANN in PYTHONPATH; entries made for another Python",
    needs=("ENV001",),
)
def python_path(m: Machine) -> Finding:
    assert m.cann is not None
    entries = [entry for entry in m.env.get("PYTHONPATH", "").split(":") if entry]
    minor = ".".join(m.probe.host.python.split(".")[:2])
    others = [e for e in entries if (found := _PYTHON.search(e)) and found[1] != minor]
    if others:
        return warn(
            say("PYTHONPATH holds packages of another Python than {minor}", minor=minor),
            *(env("PYTHONPATH", entry) for entry in others),
            advice=say("take them out of PYTHONPATH: an environment finds its packages by itself"),
        )
    places = [posixpath.normpath(m.probe.realpath(entry)) for entry in entries]
    if any(place.endswith("/python/site-packages") and m.cann_of(place) for place in places):
        return ok(say("PYTHONPATH leads to CANN's Python side"))
    if m.cann.runtime_only or not m.probe.is_dir(f"{m.cann.path}/python/site-packages"):
        return skip(say("this CANN has no Python side"))
    return fail(
        say("PYTHONPATH does not lead to CANN's Python side"),
        env("PYTHONPATH", m.env.get("PYTHONPATH", "unset")),
        fix=f"source {m.set_env}  # and do not overwrite PYTHONPATH afterwards",
        action="env",
    )


@check(
    "ENV009",
    title="no debugging switch was left on",
    why="some switches make every call wait, or keep torch_npu from loading",
    looks_at="ASCEND_LAUNCH_BLOCKING, ATB_STREAM_SYNC_EVERY_*, HCCL_DETERMINISTIC, "
    "LCCL_DETERMINISTIC, TORCH_DEVICE_BACKEND_AUTOLOAD",
    severity=Status.INFO,
)
def switches(m: Machine) -> Finding:
    on = {"1", "true", "True", "TRUE"}
    found = [
        env(name, value)
        for name, value in sorted(m.env.items())
        if (name == "ASCEND_LAUNCH_BLOCKING" and value == "1")
        or (name.startswith("ATB_STREAM_SYNC_EVERY_") and value == "1")
        or (name in ("HCCL_DETERMINISTIC", "LCCL_DETERMINISTIC") and value in on)
        or (name == "TORCH_DEVICE_BACKEND_AUTOLOAD" and value == "0")
    ]
    if found:
        names = ", ".join(item.name for item in found)
        return info(say("switches for debugging are on: {names}", names=names), *found,
                    fix="unset " + " ".join(item.name for item in found))  # fmt: skip
    return ok(say("no debugging switch is on"))


@check(
    "ENV010",
    title="what LD_PRELOAD names can be loaded",
    why="the loader complains about each missing or foreign library at every start",
    looks_at="each path in LD_PRELOAD: there, and for this machine",
    profiles="base convert",
)
def preload(m: Machine) -> Finding:
    paths = re.split(r"[:\s]+", m.env.get("LD_PRELOAD", "").strip())
    for path in filter(lambda p: p.startswith("/"), paths):
        elf = m.probe.elf(path)
        if not m.probe.exists(path):
            state = "missing"
        elif elf and elf.machine != m.arch:
            state = f"for {elf.machine}"
        else:
            continue
        rest = ":".join(p for p in paths if p != path)
        return fail(
            say("LD_PRELOAD names a library that cannot be loaded: {path}", path=path),
            env("LD_PRELOAD", path),
            file(path, state),
            fix=f"export LD_PRELOAD={shlex.quote(rest)}" if rest else "unset LD_PRELOAD",
        )
    return ok(say("LD_PRELOAD is fine"))


@check(
    "ENV011",
    title="text is UTF-8",
    why="Chinese messages and file names turn into mojibake in any other encoding",
    looks_at="the preferred encoding of the locale",
    severity=Status.INFO,
    profiles="base convert",
)
def encoding(m: Machine) -> Finding:
    name = m.probe.host.encoding.replace("_", "-").lower()
    if name in ("utf-8", "utf8"):
        return ok(say("text is UTF-8"))
    return info(
        say("text is {name}, not UTF-8", name=name),
        limit("encoding", name),
        fix="export LANG=C.UTF-8",
    )

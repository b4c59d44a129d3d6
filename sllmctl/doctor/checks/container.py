"""CTR: what a container was given of its host."""

from __future__ import annotations

import re

from sllmctl.doctor.check import (
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
from sllmctl.doctor.checks.driver import docker_run, not_given
from sllmctl.doctor.checks.environment import card_ids
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.versions import release

# glibc 2.34 starts threads by clone3; hosts with such kernels are of the time of older Docker.
_CLONE3_GLIBC, _OLD_KERNEL = (2, 34), (5, 10)


@check(
    "CTR001",
    title="the container has what it needs of the driver",
    why="a container sees only what `docker run` gave it",
    looks_at="device nodes, driver/lib64, version.info, npu-smi, dcmi and "
    "ASCEND_RUNTIME_OPTIONS=NODRV",
)
def mounts(m: Machine) -> Finding:
    if not m.in_container:
        return skip(say("this is not a container"))
    if not (m.pci or m.cards):
        return skip(say("there is no Ascend card in this machine"))
    if "NODRV" in m.env.get("ASCEND_RUNTIME_OPTIONS", ""):
        return fail(
            say("ASCEND_RUNTIME_OPTIONS=NODRV keeps the driver out of this container"),
            env("ASCEND_RUNTIME_OPTIONS", m.env["ASCEND_RUNTIME_OPTIONS"]),
            fix="docker run -e ASCEND_RUNTIME_OPTIONS= ...",
        )
    needed, helpful = not_given(m)
    missing = needed + helpful
    if not missing:
        return ok(say("the container has what it needs of the driver"))
    made = fail if needed else info
    return made(
        say("the container lacks {names}", names=", ".join(missing)),
        *(file(path, "missing") for path in missing),
        fix=docker_run(missing),
    )


@check(
    "CTR002",
    title="cards are chosen by the right variable",
    why="ASCEND_VISIBLE_DEVICES speaks to the container runtime; a process does not read it",
    looks_at="ASCEND_VISIBLE_DEVICES outside of a container, without ASCEND_RT_VISIBLE_DEVICES",
    severity=Status.WARN,
)
def variable(m: Machine) -> Finding:
    value = m.env.get("ASCEND_VISIBLE_DEVICES")
    if value and not m.in_container and "ASCEND_RT_VISIBLE_DEVICES" not in m.env:
        return warn(
            say("ASCEND_VISIBLE_DEVICES has no effect here"),
            env("ASCEND_VISIBLE_DEVICES", value),
            fix=f"export ASCEND_RT_VISIBLE_DEVICES={','.join(map(str, card_ids(value)))}",
        )
    return ok(say("cards are chosen by the right variable, or not at all"))


@check(
    "CTR003",
    title="the container's system-call filter knows this C library",
    why="Docker before 20.10.10 refuses clone3: a newer C library then cannot start a thread",
    looks_at="in a container: Seccomp in /proc/self/status, the C library and the kernel",
    severity=Status.INFO,
)
def filtered(m: Machine) -> Finding:
    if not m.in_container:
        return skip(say("this is not a container"))
    filter_on = re.search(r"^Seccomp:\s*2$", m.probe.read_text("/proc/self/status") or "", re.M)
    glibc, kernel = release(m.probe.host.glibc)[:2], release(m.probe.host.kernel)[:2]
    if filter_on and glibc >= _CLONE3_GLIBC and () < kernel < _OLD_KERNEL:
        return info(
            say("an old kernel ({kernel}) filters the system calls of a newer C library ({glibc})",
                kernel=m.probe.host.kernel, glibc=m.probe.host.glibc),
            file("/proc/self/status", "Seccomp: 2"),
            limit("kernel", m.probe.host.kernel),
            fix="docker run --security-opt seccomp=unconfined ...  # or Docker 20.10.10 or later",
        )  # fmt: skip
    return ok(say("nothing filters what this C library needs"))

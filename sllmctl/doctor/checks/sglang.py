"""SGL: SGLang on Ascend, deep_ep and sgl-kernel-npu."""

from __future__ import annotations

import posixpath
import re

from sllmctl.doctor.check import (
    Finding,
    Status,
    check,
    dist,
    fail,
    file,
    ok,
    say,
    skip,
    warn,
    worst,
)
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.versions import cann_base, cann_key, public, release

_CANN = re.compile(r"\.cann\.(\d+\.\d+\.[A-Za-z]*\d+)", re.IGNORECASE)
_SOURCES = ("sgl_kernel_npu", "deep_ep")
_DEPTH = 7
_FOLDERS = {"ascend910b": "A2", "ascend910_93": "A3"}


@check(
    "SGL001",
    title="Python, torch and CANN are those of SGLang",
    why="SGLang on Ascend is released for one row of versions",
    looks_at="the row of the installed SGLang, where the tables know it",
    severity=Status.WARN,
    profiles="sglang",
)
def row(m: Machine) -> Finding:
    version = m.dists.version("sglang")
    if not version:
        return skip(say("SGLang is not installed"))
    known = next((r for r in m.tables.sglang if release(r["sglang"]) == release(version)[:3]), None)
    if known is None:
        return skip(say("the tables do not know SGLang {version}", version=version))
    here = {
        "python": ".".join(m.probe.host.python.split(".")[:2]),
        "torch": public(m.dists.version("torch")),
        "cann": cann_base(m.cann.version) if m.cann else "",
    }
    found: list[Finding | None] = [
        warn(
            say("SGLang {version} was released for {part} {wanted}, here is {here}",
                version=version, part=part, wanted=known[part], here=value),
            dist("sglang", version),
            advice=say("use the row of this SGLang: {row}",
                       row=", ".join(f"{k} {v}" for k, v in known.items())),
        )
        for part, value in here.items()
        if value and value != known[part]
    ]  # fmt: skip
    return worst(found, ok(say("all versions are those of SGLang {version}", version=version)))


@check(
    "SGL002",
    title="deep_ep is built for this CANN, and found by Python",
    why="its version names its CANN; its library must lie beside the package",
    looks_at="sgl_kernel_npu; .cann.X in the version of deep_ep, and deep_ep_cpp*.so in "
    "site-packages",
    profiles="sglang",
)
def deep_ep(m: Machine) -> Finding:
    found = m.dists.get("deep-ep")
    if m.dists.get("sglang") and not m.dists.get("sgl-kernel-npu"):
        return fail(
            say("SGLang is here without sgl_kernel_npu, its operators for NPU"),
            dist("sgl-kernel-npu", "missing"),
            fix="bash build.sh && pip install output/*.whl  # in the source of sgl-kernel-npu",
        )
    if found is None:
        return skip(say("deep_ep is not installed"))
    match = _CANN.search(found.version)
    if match and m.cann and release(match[1])[:2] != release(m.cann.version)[:2]:
        return fail(
            say("deep_ep was built for CANN {built}, here is {cann}",
                built=match[1], cann=m.cann.version),
            dist("deep-ep", found.version),
            fix="bash build.sh && pip install --force-reinstall --no-deps output/deep_ep*.whl",
        )  # fmt: skip
    inside = m.probe.glob(f"{found.site}/deep_ep/deep_ep_cpp*.so")
    beside = [p for p in m.probe.glob(f"{found.site}/deep_ep_cpp*.so") if m.probe.exists(p)]
    if inside and not beside:
        name = posixpath.basename(inside[0])
        return fail(
            say("Python does not find deep_ep_cpp: its library lies inside the package"),
            file(inside[0]),
            fix=f"ln -sfn deep_ep/{name} {found.site}/{name}",
            action="deep_ep",
        )
    return ok(say("deep_ep {version}", version=found.version), dist("deep-ep", found.version))


@check(
    "SGL003",
    title="deep_ep has operators for this chip",
    why="build.sh builds for A3 unless told: on A2 use `bash build.sh -a deepep2`",
    looks_at="ascend910b (A2) and ascend910_93 (A3) below deep_ep/vendors/hwcomputing",
    profiles="sglang",
)
def operators(m: Machine) -> Finding:
    package = m.dists.package("deep-ep", "deep_ep")
    if package is None or m.generation not in ("A2", "A3"):
        return skip(say("deep_ep is not installed, or the chip is not known"))
    built = set()
    todo = [(f"{package}/vendors/hwcomputing", 0)]
    while todo:
        path, depth = todo.pop()
        for name in m.probe.listdir(path):
            if name in _FOLDERS:
                built.add(_FOLDERS[name])
            elif (
                depth < _DEPTH
                and m.probe.readlink(f"{path}/{name}") is None
                and m.probe.is_dir(f"{path}/{name}")
            ):
                todo.append((f"{path}/{name}", depth + 1))
    if not built or m.generation in built:
        return ok(say("deep_ep has operators for {chip}", chip=m.generation))
    return fail(
        say("deep_ep was built for {built}, the cards are {here}",
            built=", ".join(sorted(built)), here=m.generation),
        file(f"{package}/vendors/hwcomputing", ", ".join(sorted(built))),
        fix="bash build.sh -a deepep2" if m.generation == "A2" else "bash build.sh",
    )  # fmt: skip


@check(
    "SGL004",
    title="the source of sgl-kernel-npu is that of this SGLang",
    why="its main branch moves on: it no longer builds with the torch and CANN of older rows",
    looks_at="--source: whether its commit has a tag, and what its main branch asks for",
    severity=Status.WARN,
    profiles="sglang build",
)
def source(m: Machine) -> Finding:
    base = m.options.source
    if not base:
        return skip(say("--source was not given"))
    if not any(m.probe.is_dir(f"{base}/python/{n}") for n in _SOURCES):
        return skip(say("--source is no source of sgl-kernel-npu"))
    commit, tag = _commit(m, base)
    if tag:
        return ok(say("the source is that of {tag}", tag=tag), file(f"{base}/.git/HEAD", commit))
    wanted = m.tables.sgl_kernel_head
    torch, cann = m.dists.version("torch"), m.cann.version if m.cann else ""
    old = [
        f"{name} {here}"
        for name, here, key, least in (
            ("torch", torch, release(torch), release(wanted["torch"])),
            ("CANN", cann, cann_key(cann_base(cann)), cann_key(wanted["cann"])),
        )
        if here and key and least and key < least
    ]
    if not old:
        return ok(say("the source of sgl-kernel-npu suits what is installed"))
    return warn(
        say("the source of sgl-kernel-npu has no tag, and today's asks for more than {parts}",
            parts=", ".join(old)),
        file(f"{base}/.git/HEAD", commit or "unknown"),
        *(dist(name, f"{least} or later") for name, least in wanted.items()),
        fix=f"git -C {base} checkout <tag of the time of this SGLang>",
    )  # fmt: skip


def _commit(m: Machine, base: str) -> tuple[str, str]:
    """The commit that is checked out, and its tag; "" where git's files do not say."""
    git = f"{base}/.git"
    head = (m.probe.read_text(f"{git}/HEAD") or "").strip()
    packed = m.probe.read_text(f"{git}/packed-refs", 4 << 20) or ""
    refs, last = {}, ""
    for line in packed.splitlines():
        word, _, name = line.partition(" ")
        if line.startswith("^"):  # the commit behind an annotated tag
            refs[last] = line[1:]
        elif name and not line.startswith("#"):
            refs[name], last = word, name
    for path in m.probe.glob(f"{git}/refs/tags/*") + m.probe.glob(f"{git}/refs/heads/*"):
        refs[path.removeprefix(f"{git}/")] = (m.probe.read_text(path) or "").strip()
    commit = refs.get(head.removeprefix("ref: "), "") if head.startswith("ref: ") else head
    tags = [n for n, at in refs.items() if n.startswith("refs/tags/") and commit and at == commit]
    return commit, tags[0].removeprefix("refs/tags/") if tags else ""

"""CANN: which versions are here, whether they are complete, and which one is in use."""

from __future__ import annotations

import os
import posixpath

from sllmctl.doctor.cann_files import BASE, kernels_version, versions_of
from sllmctl.doctor.check import (
    Finding,
    Status,
    check,
    fail,
    file,
    info,
    ok,
    say,
    skip,
    warn,
    worst,
)
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.versions import cann_base, cann_key

KERNEL_FOLDERS = {"A2": "ascend910b", "A3": "ascend910_93", "310P": "ascend310p"}
PACKAGES = {"A2": "910b", "A3": "A3", "310P": "310p"}
# Operator packages of these releases may be mixed. Source: CANN 9.0 release notes.
MIXABLE = {"8.5.2", "9.0.0", "9.0.1"}


@check(
    "CANN001",
    title="CANN is installed",
    why="torch_npu and every engine on Ascend run on CANN",
    looks_at="ASCEND_HOME_PATH, ASCEND_TOOLKIT_HOME, LD_LIBRARY_PATH, /usr/local/Ascend and "
    "~/Ascend; the version from *_install.info, version.cfg, version.info or the folder's name "
    "(`ascend-dmi -c` belongs to another package, the toolbox)",
)
def installed(m: Machine) -> Finding:
    if m.cann is None and m.shut_out:
        return fail(
            say("this user may not look into {path}", path=m.shut_out),
            file(m.shut_out, "no access"),
            fix=f"sudo chmod a+rX {m.shut_out}",
        )
    if m.cann is None:
        return fail(
            say("there is no CANN on this machine"),
            file(BASE, "no ascend-toolkit, no cann-*"),
            fix=f"./Ascend-cann-toolkit_<version>_linux-{m.arch}.run --install",
        )
    return ok(say("CANN {version} in {path}", version=m.cann.version, path=m.cann.path),
              file(m.cann.source, m.cann.version))  # fmt: skip


@check(
    "CANN002",
    title="one CANN is in use, and its links lead somewhere",
    why="set_env.sh follows `cann` and `ascend-toolkit/latest`",
    looks_at="the links `cann` and `ascend-toolkit/latest`, and every file of the root that names "
    "a version",
    needs=("CANN001",),
)
def one_version(m: Machine) -> Finding:
    assert m.cann is not None
    found: list[Finding | None] = []
    homes = (BASE, posixpath.join(m.probe.host.home, "Ascend"))
    for home in homes:
        for link in (f"{home}/cann", f"{home}/ascend-toolkit/latest"):
            target = m.probe.readlink(link)
            if target is None:
                continue
            if not m.probe.exists(link):
                found.append(
                    fail(
                        say("{link} leads nowhere", link=link),
                        file(link, f"-> {target}"),
                        fix=f"ln -sfn {m.cann.path} {link}",
                    )
                )
            elif m.probe.realpath(link) not in (m.cann.path, m.probe.realpath(m.cann.path)):
                found.append(
                    info(
                        say(
                            "{link} is not the CANN in use ({path})",
                            link=link, path=m.cann.path,
                        ),
                        file(link, f"-> {target}"),
                    )
                )  # fmt: skip
    said = versions_of(m.probe, m.cann.path)
    if len({cann_base(version) for _, version in said}) > 1:
        found.append(
            warn(
                say("the files of {path} name different versions", path=m.cann.path),
                *(file(source, version) for source, version in said),
                advice=say("a second version was installed over the first: install it again"),
            )
        )
    if len(m.cann_roots) > 1:
        versions = ", ".join(root.version for root in m.cann_roots)
        found.append(
            info(
                say("several versions are installed: {versions}", versions=versions),
                *(file(root.path, root.version) for root in m.cann_roots),
            )
        )
    return worst(found, ok(say("one CANN, {version}", version=m.cann.version)))


@check(
    "CANN003",
    title="this CANN was tested with sllm-store",
    why="sllm-store on Ascend was tested with CANN 8.0.0, with vLLM it needs 8.1.RC1",
    looks_at="the version of CANN",
    severity=Status.WARN,
    profiles="store",
    needs=("CANN001",),
)
def tested(m: Machine) -> Finding:
    assert m.cann is not None
    version = cann_base(m.cann.version)
    seen = file(m.cann.source, m.cann.version)
    wanted = "8.1.RC1" if m.dists.get("vllm-ascend") else "8.0.0"
    if version in ("8.0.0", "8.1.RC1"):
        if version != wanted:
            return info(say("CANN {version}; {wanted} is the version tested with what is installed",
                            version=version, wanted=wanted), seen)  # fmt: skip
        return ok(say("CANN {version} is a tested one", version=version), seen)
    # What no table knows yet is no fault of the machine.
    return (warn if m.tables.may_know(version) else info)(
        say("sllm-store was not tested with CANN {version} but with {wanted}",
            version=version, wanted=wanted),
        seen,
        advice=say("if it fails, use CANN {wanted}", wanted=wanted),
    )  # fmt: skip


@check(
    "CANN004",
    title="the installation of CANN is complete",
    why="torch_npu refuses to start without runtime, compiler and operators",
    looks_at="libascendcl.so, libhccl.so and libge_runner.so in lib64, opp, runtime, compiler; for "
    "builds include/acl/acl.h",
    profiles="base build",
    needs=("CANN001", "CANN007"),
)
def complete(m: Machine) -> Finding:
    assert m.cann is not None
    root = m.cann.path
    wanted = ["lib64/libascendcl.so", "lib64/libhccl.so", "opp", "runtime"]
    if m.cann.runtime_only and "build" in m.profiles:
        return fail(
            say("{path} is the runtime alone: nothing can be built with it", path=root),
            file(root, "nnae/nnrt"),
            fix=f"./Ascend-cann-toolkit_{m.cann.version}_linux-{m.arch}.run --install",
        )
    if not m.cann.runtime_only:
        wanted += ["compiler", "lib64/libge_runner.so"]
    if "build" in m.profiles:
        wanted.append("include/acl/acl.h")
    missing = [name for name in wanted if not _anywhere(m, root, name)]
    if missing:
        return fail(
            say("CANN {version} lacks {names}", version=m.cann.version, names=", ".join(missing)),
            *(file(f"{root}/{name}", "missing") for name in missing),
            fix=f"./Ascend-cann-toolkit_{m.cann.version}_linux-{m.arch}.run --full",
        )
    return ok(say("CANN {version} is complete", version=m.cann.version), file(root))


def _anywhere(m: Machine, root: str, name: str) -> bool:
    """Whether a part is in the root, or in its folder for this machine."""
    return m.probe.exists(f"{root}/{name}") or m.probe.exists(f"{root}/{m.arch}-linux/{name}")


@check(
    "CANN005",
    title="operators for this chip are installed, of the same version",
    why="operators are a package of their own; without it calls fail with 561103 or EZ9999",
    looks_at="opp/built-in/op_impl/ai_core/tbe/kernel/<chip>, ascend_ops_install.info, and "
    "opp_kernel_running_version",
    profiles="vllm sglang",
    needs=("CANN001", "CANN004"),
)
def operators(m: Machine) -> Finding:
    assert m.cann is not None
    version = cann_base(m.cann.version)
    package = PACKAGES.get(m.generation, "<chip>")
    key = cann_key(version) or (0,)
    install = (
        f"./Ascend-cann-{package}-ops_{version}_linux-{m.arch}.run --install"
        if key >= (8, 5)
        else f"./Ascend-cann-kernels-{package}_{version}_linux-{m.arch}.run --install"
    )
    named = kernels_version(m.probe, m.cann)
    if named and cann_base(named[1]) != version and not {cann_base(named[1]), version} <= MIXABLE:
        return fail(
            say("operators are of {ops}, CANN is {cann}", ops=named[1], cann=version),
            file(*named),
            fix=install,
        )
    folder = KERNEL_FOLDERS.get(m.generation)
    base = f"{m.cann.path}/opp/built-in/op_impl/ai_core/tbe/kernel"
    there = set(m.probe.listdir(base)) - {"config"}
    if folder is None or (not there and named is None):
        return skip(say("which operators this chip needs is not known here"))
    if there and folder not in there and there & set(KERNEL_FOLDERS.values()):
        return fail(
            say("there are no operators for this chip ({folder})", folder=folder),
            file(base, ", ".join(sorted(there))),
            fix=install,
        )
    return ok(say("operators for {folder} are here", folder=folder), file(base))


@check(
    "CANN006",
    title="CANN is for this machine",
    why="an x86_64 package on aarch64 installs, and fails when it is loaded",
    looks_at="arch= in *_install.info, the machine of libascendcl.so, and `uname -m` "
    "(`uname -i` prints `unknown` on many systems)",
    needs=("CANN001",),
)
def architecture(m: Machine) -> Finding:
    assert m.cann is not None
    library = f"{m.cann.path}/lib64/libascendcl.so"
    elf = m.probe.elf(library)
    said = {m.cann.source: m.cann.arch, library: elf.machine if elf else ""}
    wrong = {name: arch for name, arch in said.items() if arch not in ("", "unknown", m.arch)}
    if wrong:
        return fail(
            say("CANN is for {other}, this machine is {arch}",
                other=next(iter(wrong.values())), arch=m.arch),
            *(file(name, arch) for name, arch in wrong.items()),
            fix=f"./Ascend-cann-toolkit_{m.cann.version}_linux-{m.arch}.run --install",
        )  # fmt: skip
    return ok(say("CANN is for {arch}", arch=m.arch))


@check(
    "CANN007",
    title="this user may read CANN",
    why="an installation by root may be closed to others",
    looks_at="access to the root, lib64 and opp",
    needs=("CANN001",),
)
def readable(m: Machine) -> Finding:
    assert m.cann is not None
    places = [m.cann.path, f"{m.cann.path}/lib64", f"{m.cann.path}/opp"]
    closed = [p for p in places if m.probe.exists(p) and not m.probe.may(p, os.R_OK | os.X_OK)]
    if closed:
        return fail(
            say("this user may not read {path}", path=closed[0]),
            *(file(path, "no access") for path in closed),
            fix=f"sudo chmod -R a+rX {m.cann.path}",
        )
    return ok(say("CANN can be read"))

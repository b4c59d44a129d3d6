"""NNAL: the ATB library that torch_npu and vllm-ascend use for transformer operators."""

from __future__ import annotations

import posixpath

from sllmctl.doctor.check import Finding, check, env, fail, file, info, ok, say, skip, warn
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.versions import cann_base, cann_key

SET_ENV = "/usr/local/Ascend/nnal/atb/set_env.sh"


def set_env(m: Machine) -> str:
    """The set_env.sh of the NNAL that is here."""
    path = f"{m.nnal[0].path.rsplit('/', 1)[0]}/set_env.sh" if m.nnal else SET_ENV
    return path if m.probe.exists(path) else SET_ENV


@check(
    "NNAL001",
    title="NNAL/ATB is installed",
    why="vllm-ascend and SGLang load libatb.so from it",
    looks_at="libatb.so below nnal/atb, beside CANN and where ATB_HOME_PATH leads",
    profiles="vllm sglang store",
    needs=("CANN001",),
)
def installed(m: Machine) -> Finding:
    assert m.cann is not None
    if m.nnal:
        return ok(
            say("NNAL {version}", version=m.nnal[0].version),
            file(m.nnal[0].path, m.nnal[0].version),
        )
    version = cann_base(m.cann.version)
    owner = m.probe.stat(m.cann.path)
    foreign = owner is not None and owner.uid != m.probe.host.euid
    return (fail if {"vllm", "sglang"} & set(m.profiles) else info)(
        say("NNAL/ATB is not installed"),
        file("/usr/local/Ascend/nnal/atb", "no libatb.so"),
        fix=f"./Ascend-cann-nnal_{version}_linux-{m.arch}.run --install",
        advice=say("as the user who owns {path}, with its set_env.sh sourced", path=m.cann.path)
        if foreign
        else None,
    )


@check(
    "NNAL002",
    title="NNAL/ATB is of the version of CANN",
    why="ATB of another release lacks functions that torch_npu calls (undefined symbol _ZN3atb...)",
    looks_at="version.info of the NNAL in use against CANN",
    profiles="vllm sglang",
    needs=("NNAL001",),
)
def version(m: Machine) -> Finding:
    assert m.cann is not None
    nnal, cann = m.nnal[0], cann_base(m.cann.version)
    seen = (file(nnal.path, nnal.version), file(m.cann.source, m.cann.version))
    if cann_base(nnal.version) == cann:
        return ok(say("NNAL {version} belongs to this CANN", version=nnal.version), *seen)
    here, there = cann_key(nnal.version), cann_key(cann)
    # 8.5.0 beside 8.5.1 works as a rule; another minor release does not.
    close = here and there and here[:3] == there[:3]
    return (warn if close else fail)(
        say("NNAL {nnal} does not belong to CANN {cann}", nnal=nnal.version, cann=cann),
        *seen,
        fix=f"./Ascend-cann-nnal_{cann}_linux-{m.arch}.run --install",
    )


@check(
    "NNAL003",
    title="NNAL/ATB is active in this process",
    why="without its set_env.sh: libatb.so: cannot open shared object file",
    looks_at="ATB_HOME_PATH, and its lib in LD_LIBRARY_PATH, as this process sees them",
    profiles="vllm sglang",
    needs=("NNAL001",),
)
def active(m: Machine) -> Finding:
    home = m.env.get("ATB_HOME_PATH", "")
    fix = f"source {set_env(m)}"
    if not home:
        return fail(
            say("set_env.sh of NNAL/ATB was not sourced"),
            env("ATB_HOME_PATH", "unset"),
            fix=fix,
            action="env",
        )
    if not m.probe.is_dir(home):
        link = posixpath.join(posixpath.dirname(m.nnal[0].path), "latest")
        dangling = m.probe.readlink(link) is not None and not m.probe.exists(link)
        return fail(
            say("{link} leads nowhere", link=link)
            if dangling
            else say("{name} leads nowhere", name="ATB_HOME_PATH"),
            env("ATB_HOME_PATH", home),
            *([file(link, f"-> {m.probe.readlink(link)}")] if dangling else []),
            fix=f"ln -sfn {m.nnal[0].path} {link}" if dangling else fix,
            action="" if dangling else "env",
        )
    if m.find_library("libatb.so") is None:
        return fail(
            say("LD_LIBRARY_PATH does not lead to libatb.so"),
            env("LD_LIBRARY_PATH", m.env.get("LD_LIBRARY_PATH", "unset")),
            fix=fix,
            action="env",
        )
    return ok(say("NNAL/ATB is active"), env("ATB_HOME_PATH", home))


@check(
    "NNAL004",
    title="NNAL/ATB has the C++ ABI of torch",
    why="libraries of the other ABI fail with undefined symbols (_ZN3Mki...)",
    looks_at="cxx_abi_N in ATB_HOME_PATH against _GLIBCXX_USE_CXX11_ABI in TorchConfig.cmake",
    profiles="vllm sglang",
    needs=("NNAL003", "PY003"),
)
def abi(m: Machine) -> Finding:
    home = m.env.get("ATB_HOME_PATH", "").rstrip("/")
    active_abi = home[-1:] if "cxx_abi_" in home else ""
    if m.torch_abi is None or active_abi not in ("0", "1"):
        return skip(say("the C++ ABI of torch is not known"))
    if int(active_abi) != m.torch_abi:
        return fail(
            say("NNAL/ATB has C++ ABI {here}, torch has {torch}",
                here=active_abi, torch=m.torch_abi),
            env("ATB_HOME_PATH", home),
            file("TorchConfig.cmake", f"_GLIBCXX_USE_CXX11_ABI={m.torch_abi}"),
            fix=f"source {set_env(m)} --cxx_abi={m.torch_abi}",
            action="env",
        )  # fmt: skip
    if "/nnal/asdsip/" in m.env.get("LD_LIBRARY_PATH", ""):
        return info(say("asdsip is sourced beside ATB"), env("LD_LIBRARY_PATH", "nnal/asdsip"))
    return ok(say("NNAL/ATB and torch have C++ ABI {abi}", abi=m.torch_abi))

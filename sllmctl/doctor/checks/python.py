"""PY: the interpreter, the C library, and the tools around it."""

from __future__ import annotations

import posixpath
import re

from sllmctl.doctor.check import (
    Finding,
    Status,
    check,
    dist,
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
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.versions import release

_GLIBCXX = re.compile(r"^GLIBCXX_3\.4\.(\d+)$")
_GLIBCXX_BYTES = re.compile(rb"GLIBCXX_3\.4\.(\d{1,3})\b")
_LATE = ("scikit-learn", "paddlepaddle", "opencv-python", "opencv-python-headless")
WHEELS = ("torch", "torch-npu", "vllm-ascend")


@check(
    "PY001",
    title="this Python suits what is installed",
    why="wheels of torch_npu and the engines exist for some Python versions only",
    looks_at="the interpreter's version against the rows of the installed torch_npu, vllm-ascend "
    "and sllm-store; free-threaded and 32-bit builds",
    profiles="base convert",
)
def interpreter(m: Machine) -> Finding:
    host = m.probe.host
    key, seen = release(host.python)[:2], limit("python", host.python)
    if host.free_threaded or host.bits != 64:
        return fail(
            say("this Python is a free-threaded or 32-bit build: torch_npu has no wheels for it"),
            seen,
            fix="conda create -n npu python=3.11",
        )
    wanted = []
    if m.dists.get("torch-npu") and (row := m.tables.python_for(m.dists.version("torch-npu"))):
        wanted.append(("torch_npu", row[0], row[1]))
    if ascend := m.tables.for_vllm_ascend(m.dists.version("vllm-ascend")):
        low, below = ascend.python
        wanted.append(("vllm-ascend", low, (below[0], below[1] - 1)))
    if m.dists.get("serverless-llm-store"):
        wanted.append(("sllm-store", (3, 8), (3, 11)))
    for name, low, high in wanted:
        if not low <= key <= high:
            return fail(
                say("Python {python} is not one that {name} has wheels for ({low} to {high})",
                    python=host.python, name=name,
                    low=".".join(map(str, low)), high=".".join(map(str, high))),
                seen,
                fix=f"conda create -n npu python={min(high, max(low, (3, 11)))[0]}."
                f"{min(high, max(low, (3, 11)))[1]}",
            )  # fmt: skip
    return ok(say("Python {version}", version=host.python), seen)


@check(
    "PY002",
    title="this is the activated environment",
    why="packages installed before `conda activate` lie in another environment",
    looks_at="CONDA_PREFIX and VIRTUAL_ENV against the interpreter's prefix; packages in ~/.local "
    "that hide the environment's; the interpreter of pip, vllm and sllm-store in PATH",
    severity=Status.WARN,
    profiles="base convert",
)
def environment(m: Machine) -> Finding:
    host = m.probe.host
    prefix = m.probe.realpath(host.prefix)
    name = "VIRTUAL_ENV" if m.env.get("VIRTUAL_ENV") else "CONDA_PREFIX"
    active = m.env.get(name, "")
    if active and m.probe.is_dir(active) and m.probe.realpath(active) != prefix:
        # A program of an environment may be run without activating it: where it has all, fine.
        whole = m.dists.get("torch") and (m.dists.get("torch-npu") or not m.has_ascend)
        return (info if whole else warn)(
            say("{active} is active, but this is the Python of {prefix}",
                active=active, prefix=host.prefix),
            env(name, active),
            limit("sys.prefix", host.prefix),
            fix=f"{active}/bin/python -m pip install sllmctl",
        )  # fmt: skip
    hidden = [
        d for d in ("torch", "torch-npu", "vllm-ascend", "sglang", "numpy")
        if host.user_site and (found := m.dists.get(d)) and found.site == host.user_site
    ]  # fmt: skip
    if hidden and active:
        return warn(
            say("{names} comes from {site}, not from the environment",
                names=", ".join(hidden), site=host.user_site),
            *(file(host.user_site, name) for name in hidden),
            fix="export PYTHONNOUSERSITE=1",
        )  # fmt: skip
    for tool in ("pip", "vllm", "sllm-store") if active else ():
        path, interpreter = _script(m, tool)
        home = posixpath.dirname(posixpath.dirname(interpreter))
        if interpreter and m.probe.realpath(home) != prefix:
            return warn(
                say("{tool} in PATH belongs to the Python of {other}, not to {prefix}",
                    tool=tool, other=home, prefix=host.prefix),
                file(path, f"#!{interpreter}"),
                fix=f"export PATH={host.prefix}/bin:$PATH",
            )  # fmt: skip
    return ok(say("one environment: {prefix}", prefix=host.prefix))


def _script(m: Machine, name: str) -> tuple[str, str]:
    """Path of a Python script in PATH, and the interpreter in its first line; "" for neither."""
    for place in filter(None, m.env.get("PATH", "").split(":")):
        path = f"{place}/{name}"
        if m.probe.exists(path):
            line = (m.probe.read_text(path, 256) or "").split("\n", 1)[0]
            match = re.match(r"#!\s*(/\S*/bin/python[\d.]*)\s*$", line)
            return path, match[1] if match else ""
    return "", ""


@check(
    "PY009",
    title="the system's C library is new enough",
    why="a wheel made for a newer glibc installs by force, and does not load",
    looks_at="the manylinux tags of torch, torch_npu and vllm-ascend against the C library",
    profiles="base convert",
)
def glibc(m: Machine) -> Finding:
    here = release(m.probe.host.glibc)[:2]
    if not here:
        return skip(say("the C library is not glibc"))
    for name in WHEELS:
        needs = m.dists.glibc(name)
        if needs and here < needs:
            wanted = ".".join(map(str, needs))
            return fail(
                say("{name} needs glibc {wanted}, this system has {here}",
                    name=name, wanted=wanted, here=m.probe.host.glibc),
                dist(name, m.dists.version(name)),
                limit("glibc", m.probe.host.glibc),
                advice=say("use a newer system image, such as Ubuntu 22.04 or openEuler 24.03"),
            )  # fmt: skip
    return ok(say("glibc {version}", version=m.probe.host.glibc))


@check(
    "PY010",
    title="libstdc++ is new enough",
    why="libraries built with a newer gcc ask for a GLIBCXX that an older libstdc++ lacks",
    looks_at="the GLIBCXX that libtorch_npu.so, libatb.so and the extensions of sllm-store need, "
    "against the libstdc++.so.6 that the loader finds first",
)
def libstdcxx(m: Machine) -> Finding:
    path = m.find_library("libstdc++.so.6")
    conda = f"{m.probe.host.prefix}/lib/libstdc++.so.6"
    # The interpreter's own RUNPATH puts conda's copy before the system's.
    if m.probe.exists(conda) and not any(
        e and m.probe.exists(f"{e}/libstdc++.so.6") for e in m.library_path
    ):
        path = conda
    raw = m.probe.read_bytes(path, 16 << 20) if path else None
    tags = [int(n) for n in _GLIBCXX_BYTES.findall(raw or b"")]
    if not path or not tags:
        return skip(say("libstdc++.so.6 was not found"))
    users = [f"{nnal.path}/atb/cxx_abi_{abi}/lib/libatb.so" for nnal in m.nnal for abi in nnal.abis]
    if package := m.dists.package("torch-npu", "torch_npu"):
        users.append(f"{package}/lib/libtorch_npu.so")
    if package := m.dists.package("serverless-llm-store", "sllm_store"):
        users += m.probe.glob(f"{package}/*.so")
    for user in users:
        elf = m.probe.elf(user)
        needs = [int(f[1]) for v in (elf.versions if elf else ()) if (f := _GLIBCXX.match(v))]
        if needs and max(needs) > max(tags):
            return fail(
                say("{user} needs GLIBCXX_3.4.{needs}, {path} ends at 3.4.{has}",
                    user=user, needs=max(needs), path=path, has=max(tags)),
                file(user, f"GLIBCXX_3.4.{max(needs)}"),
                file(path, f"GLIBCXX_3.4.{max(tags)}"),
                fix="conda install -c conda-forge libstdcxx-ng",
            )  # fmt: skip
    return ok(say("libstdc++ up to GLIBCXX_3.4.{tag}", tag=max(tags)), file(path))


@check(
    "PY014",
    title="libgomp finds room for its thread-local storage",
    why="a libgomp loaded late fails on aarch64: cannot allocate memory in static TLS block",
    looks_at="scikit-learn, paddle or opencv installed on aarch64, and libgomp in LD_PRELOAD",
    severity=Status.INFO,
)
def libgomp(m: Machine) -> Finding:
    late = [d for d in _LATE if m.dists.get(d)]
    if m.arch != "aarch64" or not late or "libgomp" in m.env.get("LD_PRELOAD", ""):
        return ok(say("nothing that loads libgomp late"))
    path = m.find_library("libgomp.so.1") or "/usr/lib/aarch64-linux-gnu/libgomp.so.1"
    return info(
        say("{names} may load libgomp too late on aarch64", names=", ".join(late)),
        *(dist(name, m.dists.version(name)) for name in late),
        fix=f"export LD_PRELOAD={path}  # only if the static TLS error appears",
    )


@check(
    "PY015",
    title="pip asks an index that has what is needed",
    why="mirrors of PyPI hold no CPU builds of torch for x86_64; plain http can be tampered with",
    looks_at="PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_TRUSTED_HOST and pip.conf",
    severity=Status.INFO,
)
def pip_index(m: Machine) -> Finding:
    home = m.probe.host.home
    places = [f"{home}/.config/pip/pip.conf", f"{home}/.pip/pip.conf", "/etc/pip.conf"]
    text = "\n".join(m.probe.read_text(path) or "" for path in places)
    urls = [m.env.get("PIP_INDEX_URL", ""), *m.env.get("PIP_EXTRA_INDEX_URL", "").split()]
    urls += re.findall(r"https?://[^\s,]+", text)
    urls = [url for url in urls if url]
    plain = [url for url in urls if url.startswith("http://")]
    trusted = re.search(r"^\s*trusted-host\s*=\s*(\S+)", text, re.MULTILINE)
    trusted_host = m.env.get("PIP_TRUSTED_HOST") or (trusted[1] if trusted else "")
    if plain:
        return info(
            say("pip asks an index without encryption: {url}", url=plain[0]),
            env("PIP_INDEX_URL", plain[0]),
            fix=f"pip config set global.index-url {plain[0].replace('http://', 'https://', 1)}",
        )
    if trusted_host:
        return info(
            say("pip does not verify the certificate of {host}", host=trusted_host),
            env("PIP_TRUSTED_HOST", trusted_host),
            fix="pip config unset global.trusted-host",
        )
    if urls and m.arch == "x86_64" and not any("download.pytorch.org" in url for url in urls):
        return info(
            say("the CPU build of torch for x86_64 is not on this mirror: {url}", url=urls[0]),
            env("PIP_INDEX_URL", urls[0]),
            fix="pip install torch==<version> --index-url https://download.pytorch.org/whl/cpu",
        )
    return ok(say("pip asks an index that has what is needed"))


@check(
    "PY016",
    title="the tools for building extensions are here",
    why="sllm-store, vllm-ascend and sgl-kernel-npu are built on the machine",
    looks_at="g++ (9 or later), cmake (3.20 or later, below 4), ninja and git in PATH; the "
    "package wheel, or setuptools from 70.1 on",
    level=1,
    profiles="build",
)
def build_tools(m: Machine) -> Finding:
    problems = []
    for tool in ("g++", "cmake", "ninja", "git"):
        ran = m.probe.run([tool, "--version"])
        if ran.code != 0:
            problems.append((tool, "missing"))
            continue
        match = re.search(r"(\d+\.\d+(?:\.\d+)?)\s*$", (ran.out.splitlines() or [""])[0])
        version = release(match[1]) if match else ()
        if not version:
            continue
        old_gcc = tool == "g++" and version < (9,)
        wrong_cmake = tool == "cmake" and not (3, 20) <= version < (4,)
        if old_gcc or wrong_cmake:
            problems.append((tool, ".".join(map(str, version))))
    setuptools = release(m.dists.version("setuptools"))
    if not m.dists.get("wheel") and (not setuptools or setuptools < (70, 1)):
        problems.append(("wheel", "missing"))
    if problems:
        names = ", ".join(f"{tool} {state}" for tool, state in problems)
        return fail(
            say("build tools are missing or of the wrong version: {names}", names=names),
            *(file(tool, state) for tool, state in problems),
            fix="conda install -c conda-forge gxx=11 'cmake>=3.20,<4' ninja git wheel",
        )
    return ok(say("the build tools are here"))

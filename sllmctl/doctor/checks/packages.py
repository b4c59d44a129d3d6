"""PY: torch, torch_npu and their companions, against each other and against CANN."""

from __future__ import annotations

import re

from sllmctl.doctor.check import Finding, Status, check, dist, fail, file, info, ok, say, skip, warn
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.versions import cann_base, cann_key, public, release

# torch_npu released for CANN in this span may run on any CANN of it.
# Source: compatibility statement of the plugin's 7.2.0 release notes.
_SPAN = ((8, 0, 0, 2), (8, 3, 0, 2))
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def torch_command(torch: str, torch_npu: str, arch: str) -> str:
    """The command that installs a pair; x86_64 needs the CPU build of torch by its own index."""
    if arch == "x86_64":
        return (
            f"pip install torch=={torch} --index-url {_CPU_INDEX} && "
            f"pip install torch_npu=={torch_npu}"
        )
    return f"pip install torch=={torch} torch_npu=={torch_npu}"


@check(
    "PY003",
    title="torch is installed, without CUDA",
    why="beside torch_npu, torch must be the CPU build: that for CUDA brings another triton",
    looks_at="the version of torch, its local part (+cpu, +cu...) and nvidia-* packages",
    profiles="base convert",
)
def torch_there(m: Machine) -> Finding:
    version = m.dists.version("torch")
    if not version:
        return fail(
            say("torch is not installed"),
            dist("torch", "missing"),
            fix=f"pip install torch --index-url {_CPU_INDEX}",
        )
    seen = dist("torch", version)
    if not m.has_ascend or not m.dists.get("torch-npu"):
        return ok(say("torch {version}", version=version), seen)
    cuda = [name for name in m.dists.all() if name.startswith("nvidia-cud")]
    if "+cu" in version or cuda:
        return warn(
            say("torch {version} is the CUDA build", version=version),
            seen,
            *(dist(name, m.dists.version(name)) for name in cuda[:3]),
            fix=f"pip install torch=={public(version)} --index-url {_CPU_INDEX}",
        )
    return ok(say("torch {version}", version=version), seen)


@check(
    "PY004",
    title="torch_npu is installed",
    why="torch reaches the NPU through torch_npu",
    looks_at="the distribution torch_npu, and libtorch_npu.so in it",
    needs=("PY003",),
)
def torch_npu_there(m: Machine) -> Finding:
    version = m.dists.version("torch-npu")
    torch = public(m.dists.version("torch"))
    if not version:
        row = m.tables.torch_npu_for(torch, m.cann.version) if m.cann else None
        return fail(
            say("torch_npu is not installed in this environment"),
            dist("torch-npu", "missing"),
            fix=f"pip install torch_npu=={row.torch_npu if row else torch}",
        )
    package = m.dists.package("torch-npu", "torch_npu")
    library = f"{package}/lib/libtorch_npu.so"
    if package is None or not m.probe.exists(library):
        return fail(
            say("torch_npu {version} has no libtorch_npu.so", version=version),
            file(library, "missing"),
            fix=f"pip install --force-reinstall --no-deps torch_npu=={public(version)}",
        )
    return ok(say("torch_npu {version}", version=version), dist("torch-npu", version))


@check(
    "PY005",
    title="torch and torch_npu are a pair",
    why="torch_npu is built against one torch; with another it fails with an undefined symbol",
    looks_at="what torch_npu requires (Requires-Dist), else the vendor's table",
    needs=("PY004",),
)
def pair(m: Machine) -> Finding:
    torch, npu = public(m.dists.version("torch")), m.dists.version("torch-npu")
    row = m.tables.for_torch_npu(npu)
    wanted = public(m.dists.pinned("torch-npu", "torch")) or (row.torch if row else "")
    seen = (dist("torch", m.dists.version("torch")), dist("torch-npu", npu))
    if not wanted:
        if release(torch)[:2] == release(npu)[:2]:
            return ok(say("torch {torch} and torch_npu {npu}", torch=torch, npu=npu), *seen)
        return info(say("the tables do not know torch_npu {npu}", npu=npu), *seen)
    if torch != wanted:
        return fail(
            say("torch_npu {npu} belongs to torch {wanted}, but torch {torch} is installed",
                npu=npu, wanted=wanted, torch=torch),
            *seen,
            fix=torch_command(wanted, public(npu), m.arch),
        )  # fmt: skip
    return ok(say("torch {torch} and torch_npu {npu}", torch=torch, npu=npu), *seen)


@check(
    "PY006",
    title="torch_npu is the one for this CANN",
    why="each release of torch_npu, each .postN too, is made for one CANN",
    looks_at="the vendor's table of torch_npu and CANN, and the pairs that vllm-ascend tested",
    needs=("PY005", "CANN001"),
)
def torch_npu_for_cann(m: Machine) -> Finding:
    assert m.cann is not None
    npu, cann = public(m.dists.version("torch-npu")), cann_base(m.cann.version)
    seen = (dist("torch-npu", m.dists.version("torch-npu")), file(m.cann.source, m.cann.version))
    engine = m.tables.for_vllm_ascend(m.dists.version("vllm-ascend"))
    if engine and public(engine.torch_npu) == npu and engine.cann == cann:
        return ok(
            say("torch_npu {npu} and CANN {cann}, as vllm-ascend tested them", npu=npu, cann=cann),
            *seen,
        )
    row = m.tables.for_torch_npu(npu)
    if row is None:
        return info(
            say("the tables ({date}) do not know torch_npu {npu}", date=m.tables.date, npu=npu),
            *seen,
        )
    if row.cann == cann:
        return ok(say("torch_npu {npu} is that of CANN {cann}", npu=npu, cann=cann), *seen)
    here, there = cann_key(cann), cann_key(row.cann)
    if here is None or there is None or not m.tables.may_know(cann):
        return info(
            say("the tables ({date}) do not know CANN {cann}", date=m.tables.date, cann=cann), *seen
        )
    better = m.tables.torch_npu_for(row.torch, cann)
    fix = f"pip install torch_npu=={better.torch_npu}" if better else ""
    advice = (
        say("or keep torch_npu, and install CANN {cann}", cann=row.cann)
        if fix
        else say("install CANN {cann}, or a torch whose torch_npu is for this CANN", cann=row.cann)
    )
    if here[:2] == there[:2] and (here[2] == there[2]):
        return info(
            say("torch_npu {npu} was released for CANN {wanted}; {cann} is close to it",
                npu=npu, wanted=row.cann, cann=cann),
            *seen,
        )  # fmt: skip
    spanned = all(_SPAN[0] <= key <= _SPAN[1] for key in (here, there))
    made = warn if spanned else fail
    return made(
        say("torch_npu {npu} was released for CANN {wanted}, not for {cann}",
            npu=npu, wanted=row.cann, cann=cann),
        *seen,
        fix=fix, advice=advice,
    )  # fmt: skip


@check(
    "PY007",
    title="torchvision and torchaudio belong to this torch",
    why="each release of them is built against one torch",
    looks_at="the versions of torchvision and torchaudio",
    severity=Status.WARN,
    profiles="store vllm sglang",
    needs=("PY003",),
)
def companions(m: Machine) -> Finding:
    torch = public(m.dists.version("torch"))
    vision, audio = (public(m.dists.version(n)) for n in ("torchvision", "torchaudio"))
    wanted = m.tables.torchvision.get(torch)
    if vision and wanted and vision != wanted:
        return warn(
            say("torchvision {vision} is not that of torch {torch} ({wanted})",
                vision=vision, torch=torch, wanted=wanted),
            dist("torchvision", vision),
            fix=f"pip install --no-deps torchvision=={wanted}",
        )  # fmt: skip
    if audio and release(audio)[:2] != release(torch)[:2] and release(torch) < (2, 9):
        return warn(
            say("torchaudio {audio} is not that of torch {torch}", audio=audio, torch=torch),
            dist("torchaudio", audio),
            fix=f"pip install --no-deps torchaudio=={torch}",
        )
    return ok(say("torchvision and torchaudio suit torch {torch}", torch=torch))


@check(
    "PY008",
    title="numpy suits CANN and torch",
    why="CANN before 9.0 and extensions of its time were compiled with NumPy 1.x",
    looks_at="numpy 2 or later with CANN before 9.0, vllm-ascend up to 0.18 or torch_npu up to 2.5",
    profiles="base convert",
)
def numpy(m: Machine) -> Finding:
    version = m.dists.version("numpy")
    if not version:
        return skip(say("numpy is not installed"))
    seen = [dist("numpy", version)]
    old = []
    key = cann_key(m.cann.version) if m.cann else None
    if key and key < (9,):
        old.append(f"CANN {m.cann.version if m.cann else ''}")
    engine = release(m.dists.version("vllm-ascend"))
    if engine and engine[:2] <= (0, 18):
        old.append(f"vllm-ascend {m.dists.version('vllm-ascend')}")
    npu = release(m.dists.version("torch-npu"))
    if npu and npu[:2] <= (2, 5):
        old.append(f"torch_npu {m.dists.version('torch-npu')}")
    if release(version)[:1] < (2,) or not old:
        return ok(say("numpy {version}", version=version), *seen)
    strict = {"store", "vllm"} & set(m.profiles) or (npu and npu[:2] <= (2, 5))
    made = fail if strict else warn
    return made(
        say("numpy {version} is too new for {names}", version=version, names=", ".join(old)),
        *seen,
        fix='pip install "numpy==1.26.4"',
    )


@check(
    "PY011",
    title="one triton",
    why="triton and triton-ascend write the same files: the last one installed wins",
    looks_at="the distributions triton and triton-ascend, and the table of vllm-ascend",
    severity=Status.WARN,
    profiles="vllm sglang",
)
def triton(m: Machine) -> Finding:
    if m.dists.get("triton") and m.dists.get("triton-ascend"):
        return warn(
            say("triton and triton-ascend are both installed"),
            dist("triton", m.dists.version("triton")),
            dist("triton-ascend", m.dists.version("triton-ascend")),
            fix="pip uninstall -y triton && pip install --force-reinstall --no-deps "
            f"triton-ascend=={m.dists.version('triton-ascend')}",
        )
    here, ascend = public(m.dists.version("triton-ascend")), m.dists.version("vllm-ascend")
    wanted = m.tables.triton_ascend_for(ascend)
    if here and wanted and here != wanted:
        return warn(
            say("triton-ascend {here} is not that of vllm-ascend {ascend} ({wanted})",
                here=here, ascend=ascend, wanted=wanted),
            dist("triton-ascend", here),
            dist("vllm-ascend", ascend),
            fix=f"pip install triton-ascend=={wanted}",
        )  # fmt: skip
    return ok(say("not more than one triton"))


@check(
    "PY012",
    title="grpcio is new enough for the generated code",
    why="generated code refuses to start with an older grpcio than it was generated for",
    looks_at="GRPC_GENERATED_VERSION in sllm_store/proto/*_pb2_grpc.py against grpcio; the "
    "releases of transformers and accelerate that it pins",
    profiles="store",
)
def grpc(m: Machine) -> Finding:
    package = m.dists.package("serverless-llm-store", "sllm_store")
    here = m.dists.version("grpcio")
    if package is None:
        return skip(say("sllm-store is not installed"))
    if not here:
        return fail(
            say("grpcio is not installed"), dist("grpcio", "missing"), fix="pip install grpcio"
        )
    for path in [
        *m.probe.glob(f"{package}/*_pb2_grpc.py"),
        *m.probe.glob(f"{package}/*/*_pb2_grpc.py"),
    ]:
        match = re.search(
            r"GRPC_GENERATED_VERSION\s*=\s*['\"]([\d.]+)", m.probe.read_text(path) or ""
        )
        if match and release(here) < release(match[1]):
            return fail(
                say("the code was generated for grpcio {wanted}, {here} is installed",
                    wanted=match[1], here=here),
                file(path, match[1]),
                dist("grpcio", here),
                fix=f"pip install 'grpcio>={match[1]}'",
            )  # fmt: skip
    for name in ("transformers", "accelerate"):
        version, wanted = m.dists.version(name), m.dists.pinned("serverless-llm-store", name)
        if version and wanted and release(version)[:2] != release(wanted)[:2]:
            return info(
                say("sllm-store was written for {name} {wanted}, {here} is installed",
                    name=name, wanted=wanted, here=version),
                dist(name, version),
                fix=f"pip install {name}=={wanted}",
            )  # fmt: skip
    return ok(say("grpcio {version}", version=here), dist("grpcio", here))


@check(
    "PY013",
    title="what CANN's Python side imports is installed",
    why="operators are compiled by Python code that imports these; without them: error 500001",
    looks_at="attrs, decorator, sympy, cffi, pyyaml, psutil, protobuf, scipy, requests, absl-py",
    severity=Status.WARN,
    needs=("CANN001", "PY004"),
)
def cann_python(m: Machine) -> Finding:
    missing = [name for name in m.tables.cann_python if not m.dists.get(name)]
    more = [name for name in m.tables.cann_python_more if not m.dists.get(name)]
    if missing or more:
        missing, made = [*missing, *more], warn if missing else info
        return made(
            say("packages that CANN imports are missing: {names}", names=", ".join(missing)),
            *(dist(name, "missing") for name in missing),
            fix="pip install " + " ".join(missing),
        )
    return ok(say("what CANN imports is installed"))

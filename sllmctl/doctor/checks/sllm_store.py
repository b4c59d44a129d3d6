"""STORE: sllm-store, its extensions, its libglog.so, its pool and its files."""

from __future__ import annotations

import posixpath
import re

from sllmctl.doctor.check import (
    Finding,
    Status,
    check,
    cmd,
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
    worst,
)
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.probe import parse_json

DIST, MODULE = "serverless-llm-store", "sllm_store"
PORT = 8073
CHUNK_BYTES = 32 << 20
# The sizes that its command line reads: whole numbers, 1 KB = 2^10.
# Source: the size parser in its utils.py.
_SIZE = re.compile(r"([1-9][0-9]{0,17})(B|KB|MB|GB|TB|PB|EB|ZB|YB)", re.ASCII)
_UNITS = ("B", "KB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")
_BESIDE = ("no_split_modules.json", "tied_no_split_modules.json")
_TORCH = re.compile(r"^torch\s*==\s*([\w.]+)", re.MULTILINE)
_ENVIRONMENT = re.compile(r"(/[\w./-]*/envs/[\w.-]+)")


def package_of(m: Machine) -> str | None:
    """Directory of the package that Python imports: also that of a source tree."""
    return m.dists.package(DIST, MODULE)


def built_glog(m: Machine, package: str) -> str | None:
    """The libglog.so that a build left behind, or the environment's own, or None."""
    source = posixpath.dirname(package)
    places = m.probe.glob(f"{source}/build/lib.linux-*/{MODULE}/libglog.so")
    places += m.probe.glob(f"{m.probe.host.prefix}/lib/libglog.so*")
    for path in places:
        elf = m.probe.elf(path)
        if elf is not None and elf.machine == m.arch:
            return path
    return None


@check(
    "STORE001",
    title="sllm-store is installed with its extensions",
    why="a build without torch leaves the compiled extensions out, without an error",
    looks_at="_C*.so and _checkpoint_store*.so in the package sllm_store, and whether that is an "
    "installation or a source tree",
    profiles="store",
)
def installed(m: Machine) -> Finding:
    package = package_of(m)
    if package is None:
        if m.dists.get(DIST):
            return fail(
                say("the package sllm_store is missing"),
                dist(DIST, m.dists.version(DIST)),
                fix="pip install --no-build-isolation --no-deps .  # in the source of sllm-store",
            )
        return skip(say("sllm-store is not installed"))
    missing = [n for n in ("_C", "_checkpoint_store") if not m.probe.glob(f"{package}/{n}*.so")]
    if missing:
        return fail(
            say("sllm-store has no compiled extension: {names}", names=", ".join(missing)),
            *(file(f"{package}/{name}*.so", "missing") for name in missing),
            fix="pip install --no-build-isolation --no-deps .  # in the source, torch_npu first",
        )
    if m.dists.editable(DIST) and not package.startswith(f"{m.dists.all()[DIST].site}/"):
        return info(
            say("Python imports sllm_store from its source: {path}", path=package),
            file(package, "editable"),
        )
    return ok(say("sllm-store {version}", version=m.dists.version(DIST)), file(package))


@check(
    "STORE002",
    title="libglog.so lies beside sllm_store",
    why="the server loads <package>/libglog.so; a link into `build` dies with `rm -rf build`",
    looks_at="libglog.so in the package: there, no broken link, for this machine",
    profiles="store",
    needs=("STORE001",),
)
def libglog(m: Machine) -> Finding:
    package = package_of(m)
    assert package is not None
    path = f"{package}/libglog.so"
    found = built_glog(m, package)
    fix = f"cp --remove-destination {found} {path}" if found else (
        "pip install --force-reinstall --no-build-isolation --no-deps .  # in the source"
    )  # fmt: skip
    action = "libglog" if found else ""
    if not m.probe.lexists(path):
        return fail(
            say("libglog.so does not lie beside sllm_store"),
            file(path, "missing"),
            *([file(found, "built")] if found else []),
            fix=fix, action=action,
        )  # fmt: skip
    if not m.probe.exists(path):
        target = m.probe.readlink(path)
        return fail(
            say("libglog.so beside sllm_store is a broken link"),
            file(path, f"-> {target}"),
            fix=fix, action=action,
        )  # fmt: skip
    elf = m.probe.elf(path)
    if elf is not None and elf.machine != m.arch:
        return fail(
            say("libglog.so is for {machine}, this machine is {arch}",
                machine=elf.machine, arch=m.arch),
            file(path, elf.machine),
            fix=fix, action=action,
        )  # fmt: skip
    return ok(say("libglog.so is here"), file(path))


@check(
    "STORE003",
    title="the extensions were built for NPU, with this torch",
    why="a build that does not see CANN falls back to the CPU; another torch changes the ABI",
    looks_at="the libraries that the extensions need, where they look for them (RUNPATH), and "
    "whether torch was installed after them",
    profiles="store",
    needs=("STORE001",),
)
def extensions(m: Machine) -> Finding:
    package = package_of(m)
    paths = m.probe.glob(f"{package}/_checkpoint_store*.so") + m.probe.glob(f"{package}/_C*.so")
    headers = [elf for path in paths if (elf := m.probe.elf(path)) is not None]
    needed = {name for elf in headers for name in elf.needed}
    rebuild = (
        "USE_CANN=1 pip install --force-reinstall --no-build-isolation --no-deps .  # in the source"
    )
    if needed and not any(n.startswith(("libtorch_npu", "libascendcl")) for n in needed):
        return fail(
            say("sllm-store was built for the CPU: its extensions do not use CANN"),
            *(file(path, "needs neither libtorch_npu.so nor libascendcl.so") for path in paths),
            fix=rebuild,
        )
    torch = m.dists.get("torch")
    record = m.probe.stat(f"{torch.info}/RECORD") if torch else None
    built = [node.mtime for path in paths if (node := m.probe.stat(path))]
    # A wheel keeps the time of its build in its files, RECORD has that of the installation.
    if record and built and record.mtime > max(built) + 60:
        return warn(
            say("torch was installed after sllm-store was built"),
            file(f"{torch.info}/RECORD" if torch else "", "newer"),
            fix=rebuild,
        )
    for path, elf in zip(paths, headers, strict=False):
        for entry in elf.runpath.split(":"):
            foreign = _ENVIRONMENT.match(entry)
            if foreign and m.probe.realpath(foreign[1]) != m.probe.realpath(m.probe.host.prefix):
                return warn(
                    say("the extensions take their libraries from another environment: {path}",
                        path=foreign[1]),
                    file(path, f"RUNPATH {entry}"),
                    fix=rebuild,
                )  # fmt: skip
            if entry.startswith("/") and not m.probe.is_dir(entry):
                return info(
                    say("the extensions look for libraries in {path}, which is gone", path=entry),
                    file(path, f"RUNPATH {entry}"),
                    fix=rebuild,
                )
    return ok(say("the extensions use CANN"), *(file(path) for path in paths))


@check(
    "STORE004",
    title="the source of sllm-store can be built here",
    why="its build installs one torch and its requirements another; its CMake file names a path",
    looks_at="--source: torch in requirements.txt and requirements-build.txt, paths in "
    "CMakeLists.txt, and USE_CANN and ASCEND_TOOLKIT_HOME",
    severity=Status.WARN,
    profiles="store build",
)
def source(m: Machine) -> Finding:
    given = m.options.source
    if not given:
        return skip(say("--source was not given"))
    base = next(
        (d for d in (given, f"{given}/{MODULE}") if m.probe.exists(f"{d}/CMakeLists.txt")), None
    )
    if base is None:
        return skip(say("--source is no source of sllm-store"))
    found: list[Finding | None] = []
    pins = {
        name: match[1]
        for name in ("requirements-build.txt", "requirements.txt")
        if (match := _TORCH.search(m.probe.read_text(f"{base}/{name}") or ""))
    }
    if len(set(pins.values())) > 1:
        torch = m.dists.version("torch") or pins["requirements.txt"]
        found.append(
            warn(
                say("the build asks for torch {build}, the installation for torch {run}",
                    build=pins["requirements-build.txt"], run=pins["requirements.txt"]),
                *(file(f"{base}/{name}", version) for name, version in pins.items()),
                fix=f"pip install --no-build-isolation --no-deps {base}  # with torch {torch} here",
            )
        )  # fmt: skip
    text = m.probe.read_text(f"{base}/CMakeLists.txt", 1 << 20) or ""
    foreign = [p for p in _ENVIRONMENT.findall(text) if p != m.probe.host.prefix]
    if foreign:
        found.append(
            warn(
                say("CMakeLists.txt names another environment: {path}", path=foreign[0]),
                file(f"{base}/CMakeLists.txt", foreign[0]),
                fix=f"sed -i 's#{foreign[0]}#{m.probe.host.prefix}#g' {base}/CMakeLists.txt",
            )
        )
    if m.has_ascend and m.env.get("USE_CANN") != "1":
        found.append(
            warn(
                say("without USE_CANN=1 the build is for the CPU"),
                env("USE_CANN", m.env.get("USE_CANN", "unset")),
                fix="export USE_CANN=1",
            )
        )
    if m.has_ascend and not m.env.get("ASCEND_TOOLKIT_HOME"):
        found.append(
            warn(
                say("{name} is not set", name="ASCEND_TOOLKIT_HOME"),
                env("ASCEND_TOOLKIT_HOME", "unset"),
                fix=f"source {m.set_env}",
            )
        )
    return worst(found, ok(say("the source of sllm-store can be built here"), file(base)))


@check(
    "STORE005",
    title="the server of sllm-store answers",
    why="clients dial 127.0.0.1:8073",
    looks_at="a TCP connection to 127.0.0.1:8073",
    severity=Status.INFO,
    level=1,
    profiles="store",
    needs=("STORE001",),
)
def server(m: Machine) -> Finding:
    if m.probe.connects("127.0.0.1", PORT):
        return ok(say("port {port} answers", port=PORT))
    return info(
        say("the server of sllm-store is not running"),
        cmd(f"127.0.0.1:{PORT}", "refused"),
        fix="sllm-store start --storage-path ./models --mem-pool-size 4GB",
    )


@check(
    "STORE006",
    title="the pool holds the model",
    why="a pool smaller than the model cannot load it; 32 MB must divide its size",
    looks_at="--mem-pool-size against the bytes of --model, and the chunk of sllm-store",
    profiles="store",
)
def pool(m: Machine) -> Finding:
    size = m.options.pool_bytes
    if size is None:
        return skip(say("--mem-pool-size was not given"))
    text = m.options.pool_text
    if read := _SIZE.fullmatch(text):
        size = int(read[1]) << 10 * _UNITS.index(read[2])
    elif text:
        return info(
            say("sllm-store cannot read the size {text}", text=text),
            limit("--mem-pool-size", text),
            fix=f"sllm-store start --mem-pool-size {max(1, size >> 30)}GB",
            advice=say("it reads whole numbers with B, KB, MB, GB or TB, and GB as 2^30 bytes"),
        )
    need = m.model_bytes
    if need > size:
        chunks = -(-need // CHUNK_BYTES) * CHUNK_BYTES
        return fail(
            say("the pool ({pool} MB) is smaller than the model ({model} MB)",
                pool=size >> 20, model=need >> 20),
            limit("--mem-pool-size", size),
            fix=f"sllm-store start --mem-pool-size {-(-chunks >> 30)}GB",
        )  # fmt: skip
    if size % CHUNK_BYTES:
        return fail(
            say("the pool is not a multiple of sllm-store's chunk (32 MB)"),
            limit("--mem-pool-size", size),
            advice=say("sllm-store reads GB as 2^30 bytes: give it whole GB"),
        )
    return ok(say("the pool is {pool} MB", pool=size >> 20))


@check(
    "STORE007",
    title="the model is in sllm-store's format",
    why="the server reads tensor.data_N and tensor_index.json, not safetensors",
    looks_at="the files of --model (also in rank_0): tensor_index.json, and every entry inside its "
    "data files",
    profiles="store",
)
def files(m: Machine) -> Finding:
    path = m.model_path
    if not m.options.model:
        return skip(say("--model was not given"))
    if not path:
        return skip(say("--model is not a directory"))
    base = f"{path}/rank_0" if m.probe.is_dir(f"{path}/rank_0") else path
    index = f"{base}/tensor_index.json"
    text = m.probe.read_text(index, 256 << 20)
    if text is None:
        return fail(
            say("the model is not in sllm-store's format"),
            file(index, "missing"),
            advice=say("convert it: sllmctl convert MODEL --format sllm-store"),
        )
    sizes = [
        node.size for n in m.probe.listdir(base)
        if n.startswith("tensor.data_") and (node := m.probe.stat(f"{base}/{n}"))
    ]  # fmt: skip
    try:
        spans = [(int(entry[0]), int(entry[1])) for entry in parse_json(text).values()]
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        spans = [(-1, -1)]
    if any(offset < 0 or size < 0 for offset, size in spans):
        return fail(say("{path} cannot be read", path=index), file(index),
                    advice=say("convert the model again"))  # fmt: skip
    end = max((offset + size for offset, size in spans), default=0)
    if end > sum(sizes):
        return fail(
            say("the data files are cut short: {have} of {need} bytes", have=sum(sizes), need=end),
            file(index, f"{end} bytes"),
            advice=say("convert the model again"),
        )
    beside = ("config.json", *(() if base != path else _BESIDE))
    missing = [name for name in beside if not m.probe.exists(f"{path}/{name}")]
    if missing:
        return info(
            say("the model lacks files that sllm-store writes beside it: {names}",
                names=", ".join(missing)),
            *(file(f"{path}/{name}", "missing") for name in missing),
            advice=say("convert the model again"),
        )  # fmt: skip
    return ok(say("the model is in sllm-store's format"), file(index))


@check(
    "STORE008",
    title="client and server of sllm-store can share device memory",
    why="the server lets in the client by its process id; otherwise the shared handle is refused",
    looks_at="the process of the server in /proc: seen from here, of this user or root, with the "
    "same ASCEND_RT_VISIBLE_DEVICES",
    severity=Status.WARN,
    level=1,
    profiles="store",
    needs=("STORE005",),
)
def sharing(m: Machine) -> Finding:
    if not m.probe.connects("127.0.0.1", PORT):
        return skip(say("the server of sllm-store is not running"))
    process = next((p for p in m.probe.glob("/proc/[0-9]*") if _is_server(m, p)), None)
    if process is None:
        return warn(
            say("the server of sllm-store runs where this process cannot see it"),
            file("/proc", "no `sllm-store start`"),
            fix="docker run --pid=host ..." if m.in_container else "",
            advice=None if m.in_container else say("run server and client in one container"),
        )
    here, there = (m.probe.readlink(f"{p}/ns/pid") for p in ("/proc/self", process))
    if here and there and here != there:
        return warn(
            say("the server of sllm-store has process ids of its own"),
            file(f"{process}/ns/pid", there),
            fix="docker run --pid=host ...",
        )
    owner, user = m.probe.stat(process), m.probe.host.euid
    if owner is not None and owner.uid != user and 0 not in (owner.uid, user):
        return warn(
            say("the server of sllm-store runs as user {server}, this is user {client}",
                server=owner.uid, client=user),
            file(process, f"user {owner.uid}"),
            advice=say("run server and client as one user"),
        )  # fmt: skip
    raw = m.probe.read_text(f"{process}/environ", 1 << 20)
    if raw is not None:
        name = "ASCEND_RT_VISIBLE_DEVICES"
        theirs = dict(entry.partition("=")[::2] for entry in raw.split("\0")).get(name, "")
        ours = m.env.get(name, "")
        if theirs != ours:
            return warn(
                say("server and client see different cards: {server} and {client}",
                    server=theirs or "-", client=ours or "-"),
                file(f"{process}/environ", f"{name}={theirs}"),
                env(name, ours or "unset"),
                fix=f"export {name}={theirs}" if theirs else f"unset {name}",
            )  # fmt: skip
    return ok(say("client and server can share device memory"), file(process))


def _is_server(m: Machine, process: str) -> bool:
    words = (m.probe.read_text(f"{process}/cmdline", 4096) or "").split("\0")
    return "start" in words and any(re.search(r"(^|/)sllm[-_]store$", word) for word in words)

"""Machines in a directory: a healthy one, and what makes each scenario differ from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.doctor.elf_file import shared_library
from tests.doctor.smi_output import cards, render

A = "usr/local/Ascend"
SITE = "/opt/npu/lib/python3.10/site-packages"
MODEL_BYTES = 1 << 20
INNER = {
    "8.0.0": "V100R001C20SPC001B251",
    "8.1.RC1": "V100R001C21SPC001B238",
    "8.2.RC1": "V100R001C22SPC001B231",
    "8.5.0": "V100R001C25SPC001B232",
    "9.1.0": "V100R001C11SPC001B243",
}
DRIVER = {
    "24.1.0": ("[7.0.0,7.6.99]", "7.6.0.1.220"),
    "25.0.rc1.1": ("[7.0.0,7.7.99]", "7.7.0.1.231"),
    "25.2.0": ("[7.0.0,7.7.99]", "7.7.0.6.236"),
    "25.5.1": ("[6.4.0,6.4.99],[7.0.0,8.9.9]", "7.8.0.6.201"),
    "27.0.0": ("[7.0.0,9.9.9]", "8.0.0.1.100"),
    "26.1.0": ("[7.0.0,8.9.9]", "7.8.0.7.220"),
}
CANN_PYTHON = (
    "attrs", "decorator", "sympy", "cffi", "pyyaml", "psutil", "protobuf", "scipy", "requests",
    "absl-py",
)  # fmt: skip


class Tree:
    """A machine in a directory. Paths are relative to its root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.arch = "aarch64"
        self.nodes: dict[str, Any] = {}
        self.commands: dict[str, Any] = {}
        self.env: dict[str, str] = {}
        self.host: dict[str, Any] = {}
        self.more: dict[str, Any] = {"space": {}, "direct_io": {}, "ports": [], "http": {}}

    def file(self, path: str, text: str | bytes = "") -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.write_bytes(text if isinstance(text, bytes) else text.encode())

    def read(self, path: str) -> str:
        return (self.root / path).read_text()

    def change(self, path: str, old: str, new: str) -> None:
        text = self.read(path)
        assert old in text
        self.file(path, text.replace(old, new))

    def directory(self, path: str) -> None:
        (self.root / path).mkdir(parents=True, exist_ok=True)

    def link(self, path: str, target: str) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target)

    def remove(self, *paths: str) -> None:
        for path in paths:
            place = self.root / path
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink()

    def elf(
        self, path: str, machine: str = "", needed: Sequence[str] = (),
        versions: Sequence[str] = (), runpath: str = "",
    ) -> None:  # fmt: skip
        self.file(path, shared_library(machine or self.arch, needed, versions, runpath))

    def node(self, path: str, **values: Any) -> None:
        self.nodes["/" + path] = {"kind": "char", "uid": 1000, "gid": 1000, "mode": 0o660, **values}

    def command(self, command: str, out: str = "", code: int | None = 0, err: str = "") -> None:
        self.commands[command] = {"code": code, "out": out, "err": err}

    def dist(
        self, name: str, version: str, *, requires: Sequence[str] = (), tag: str = "",
        files: Sequence[str] = (), entry_points: str = "", site: str = SITE, direct_url: str = "",
    ) -> None:  # fmt: skip
        self.undist(name)
        info = f"{site}/{name.replace('-', '_')}-{version}.dist-info".lstrip("/")
        lines = "".join(f"Requires-Dist: {r}\n" for r in requires)
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        self.file(f"{info}/METADATA", head + lines)
        self.file(f"{info}/RECORD", "")
        if tag:
            self.file(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: cp310-cp310-{tag}\n")
        if entry_points:
            self.file(f"{info}/entry_points.txt", entry_points)
        if direct_url:
            self.file(f"{info}/direct_url.json", direct_url)
        for path in files:
            self.file(f"{site}/{path}".lstrip("/"))

    def undist(self, *names: str) -> None:
        for name in names:
            name = name.replace("-", "_")
            for found in (self.root / SITE.lstrip("/")).glob(f"{name}-*.dist-info"):
                shutil.rmtree(found)

    def write(self) -> Path:
        document = {
            "host": {**self.host, "env": self.env},
            "nodes": self.nodes,
            "commands": self.commands,
            **self.more,
        }
        (self.root / "machine.json").write_text(json.dumps(document))
        return self.root


def good(
    t: Tree, cann: str = "8.1.RC1", driver: str = "25.0.rc1.1", npu: str = "910B3", count: int = 8,
    abi: int = 0,
) -> Tree:  # fmt: skip
    """A healthy Atlas A2 machine with CANN, NNAL, torch_npu and vllm-ascend of one row."""
    arch = t.arch
    new = tuple(int(n) for n in cann.split(".")[:2]) >= (8, 5)
    t.host = {
        "machine": arch, "kernel": "5.10.0", "glibc": "2.35", "python": "3.10.14",
        "prefix": "/opt/npu", "sys_path": [SITE], "home": "/root", "user": "root",
        "name": "npu-host", "cwd": "/root",
    }  # fmt: skip
    _files_of_system(t)
    _files_of_driver(t, driver, npu, count)
    root = f"{A}/cann-{cann}" if new else f"{A}/ascend-toolkit/{cann}"
    _files_of_cann(t, root, cann, new=new)
    nnal(t, cann)
    t.env = sourced(f"/{root}", abi, arch)
    _packages(t, abi)
    return t


def _files_of_system(t: Tree) -> None:
    t.file("etc/ascend_install.info", "Driver_Install_Path_Param=/usr/local/Ascend\n"
           "Driver_Install_For_All=yes\nDriver_Install_Status=complete\n")  # fmt: skip
    t.file(
        "proc/meminfo", "MemTotal: 1056784384 kB\nMemAvailable: 1000000000 kB\nSwapTotal: 0 kB\n"
    )
    t.file(
        "proc/self/mountinfo",
        "20 1 253:0 / / rw - ext4 /dev/vda rw\n21 20 0:20 / /dev/shm rw - tmpfs tmpfs rw\n"
        "22 20 259:0 / /data rw - xfs /dev/nvme0n1 rw\n",
    )
    t.file("proc/sys/net/ipv4/ip_local_port_range", "32768\t59999\n")
    t.file("proc/net/tcp", "  sl  local_address rem_address   st\n")
    t.file("lib64/libstdc++.so.6", b"\0GLIBCXX_3.4.28\0GLIBCXX_3.4.30\0")
    t.directory("opt/npu/bin")
    t.directory("root")
    t.directory("data/models")
    t.directory("dev/shm")
    t.file("proc/self/cgroup", "0::/\n")
    t.file("proc/self/status", "Name:\tpython3\nUmask:\t0022\nSeccomp:\t0\n")
    t.link("proc/self/ns/pid", "pid:[4026531836]")
    t.directory("tmp")
    t.more["space"] = {
        "/": [1 << 40, 1 << 39, 1 << 26, 1 << 25],
        "/dev/shm": [64 << 30, 64 << 30, 0, 0],
        "/data": [4 << 40, 2 << 40, 1 << 26, 1 << 25],
    }
    t.more["direct_io"] = {"/": True}


def _files_of_driver(t: Tree, driver: str, npu: str, count: int) -> None:
    interval, firmware = DRIVER[driver]
    t.file(
        f"{A}/driver/version.info",
        f"Version={driver}\nascendhal_version=7.35.23\nInnerversion=V100R001C21SPC002B220\n"
        "compatible_version=[V100R001C17],[V100R001C18],[V100R001C19],[V100R001C20],[V100R001C21]\n"
        f"compatible_version_fw={interval}\npackage_version={driver}\n",
    )
    minor = ".".join(driver.split(".")[:2])
    t.file(
        f"{A}/firmware/version.info",
        f"Version={firmware}\nfirmware_version=1.0\npackage_version={driver}\n"
        f"compatible_version_drv=[23.0.0,23.0.0.],[{minor},{minor}.]\n",
    )
    t.elf(f"{A}/driver/lib64/driver/libascend_hal.so")
    for i in range(count):
        t.node(f"dev/davinci{i}")
        t.file(f"sys/bus/pci/devices/0000:{0xC1 + i:02x}:00.0/vendor", "0x19e5\n")
        t.file(f"sys/bus/pci/devices/0000:{0xC1 + i:02x}:00.0/device", "0xd802\n")
    for name in ("davinci_manager", "devmm_svm", "hisi_hdc"):
        t.node(f"dev/{name}")
    t.command("npu-smi info", render(driver, cards(count, npu)))


def _files_of_cann(t: Tree, root: str, cann: str, *, new: bool) -> None:
    arch = t.arch
    lists = "compatible_version=[V100R001C15],[V100R001C18]\n" if cann < "9" else ""
    t.file(
        f"{root}/{arch}-linux/ascend_toolkit_install.info",
        f"package_name=Ascend-cann-toolkit\nversion={cann}\ninnerversion={INNER.get(cann, '')}\n"
        f"{lists}arch={arch}\npath=/{root if new else f'{root}/{arch}-linux'}\n",
    )
    if not new:
        t.file(
            f"{root}/version.cfg",
            "# version: 1.0\n"
            + "".join(
                f"{part}_{kind}_version=[7.7.0.1.238:{cann}]\n"
                for part in ("runtime", "compiler", "hccl", "opp", "toolkit", "opp_kernel")
                for kind in ("running", "upgrade", "installed")
            ),
        )
        t.link(f"{A}/ascend-toolkit/latest", cann)
    else:
        t.file(f"{root}/{arch}-linux/ascend_ops_install.info", f"version={cann}\narch={arch}\n")
        t.file(f"{root}/set_env.sh", "# fake\n")
        t.link(f"{A}/cann", f"cann-{cann}")
        t.link(f"{A}/ascend-toolkit/latest", f"/{root}")
    t.file(f"{A}/ascend-toolkit/set_env.sh", "# fake\n")
    for name in (
        "runtime/lib64/stub", "compiler", "opp/built-in/op_impl/ai_core/tbe/kernel/ascend910b",
        "python/site-packages/tbe", "bin",
    ):  # fmt: skip
        t.directory(f"{root}/{name}")
    for name in ("libascendcl.so", "libhccl.so", "libruntime.so", "libge_runner.so"):
        t.elf(f"{root}/lib64/{name}")
    t.file(f"{root}/include/acl/acl.h")


def nnal(t: Tree, version: str) -> None:
    base = f"{A}/nnal/atb"
    t.link(f"{base}/latest", version)
    t.file(f"{base}/set_env.sh")
    t.file(
        f"{base}/{version}/version.info",
        f"    Ascend-cann-atb : {version}\n    Ascend-cann-atb Version : {version}.B110\n"
        f"    Platform : {t.arch}\n    branch : x\n",
    )
    for abi in (0, 1):
        t.elf(f"{base}/{version}/atb/cxx_abi_{abi}/lib/libatb.so", versions=["GLIBCXX_3.4.21"])


def sourced(root: str, abi: int, arch: str) -> dict[str, str]:
    """What set_env.sh of CANN and of NNAL leave behind."""
    atb = f"/{A}/nnal/atb/latest/atb/cxx_abi_{abi}"
    libraries = [
        f"{atb}/lib", f"{root}/lib64", f"/{A}/driver/lib64", f"/{A}/driver/lib64/driver",
    ]  # fmt: skip
    return {
        "ASCEND_TOOLKIT_HOME": root,
        "ASCEND_HOME_PATH": root,
        "ASCEND_AICPU_PATH": root,
        "ASCEND_OPP_PATH": f"{root}/opp",
        "ATB_HOME_PATH": atb,
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PYTHONPATH": f"{root}/python/site-packages",
        "CONDA_PREFIX": "/opt/npu",
        "LANG": "C.UTF-8",
    }


def torch_npu(t: Tree, version: str, requires: str) -> None:
    t.dist("torch_npu", version, requires=[f"torch=={requires}"], tag="manylinux_2_17_aarch64")
    t.elf(f"{SITE[1:]}/torch_npu/lib/libtorch_npu.so", versions=["GLIBCXX_3.4.21"])


def _packages(t: Tree, abi: int) -> None:
    t.dist("torch", "2.5.1", tag="manylinux2014_aarch64")
    t.file(f"{SITE[1:]}/torch/share/cmake/Torch/TorchConfig.cmake",
           f'set(TORCH_CXX_FLAGS "-D_GLIBCXX_USE_CXX11_ABI={abi}")\n')  # fmt: skip
    torch_npu(t, "2.5.1", "2.5.1")
    t.dist("numpy", "1.26.4")
    for name in CANN_PYTHON:
        t.dist(name, "6.1.0")
    vllm(t, "0.7.3", "0.7.3.post1")


def vllm(t: Tree, version: str, ascend: str) -> None:
    t.dist("vllm", f"{version}+empty")
    t.dist(
        "vllm_ascend", ascend,
        entry_points="[vllm.platform_plugins]\nascend = vllm_ascend:register\n",
        files=["vllm/config.py", "vllm_ascend/__init__.py"],
    )  # fmt: skip
    t.elf(f"{SITE[1:]}/vllm_ascend/vllm_ascend_C.cpython-310-aarch64-linux-gnu.so")


def store(t: Tree) -> None:
    """sllm-store of the fork, built and installed, beside the rest."""
    package = f"{SITE[1:]}/sllm_store"
    t.dist("serverless_llm_store", "0.0.1", files=["sllm_store/__init__.py"])
    for name in ("_C", "_checkpoint_store"):
        t.elf(
            f"{package}/{name}.cpython-310-aarch64-linux-gnu.so",
            needed=["libtorch_npu.so", "libascendcl.so", "libc10.so"],
            versions=["GLIBCXX_3.4.21"],
        )
    t.elf(f"{package}/libglog.so")
    t.file(
        f"{package}/proto/storage_pb2_grpc.py", "GRPC_GENERATED_VERSION = '1.49.1'\nimport grpc\n"
    )
    t.dist("grpcio", "1.49.1")
    server(t)


def server(t: Tree, user: int = 0) -> None:
    """The server of sllm-store, as a process."""
    t.more["ports"] = [8073]
    t.nodes["/proc/4711"] = {"kind": "dir", "mode": 0o555, "uid": user, "gid": user}
    t.file("proc/4711/cmdline", "/usr/bin/python3\0/opt/npu/bin/sllm-store\0start\0")
    t.file("proc/4711/environ", "PATH=/usr/bin\0LANG=C.UTF-8\0")
    t.link("proc/4711/ns/pid", "pid:[4026531836]")


def row_85(t: Tree) -> Tree:
    """A healthy machine of CANN 8.5.0, with the engines of its row."""
    good(t, "8.5.0", "25.5.1")
    t.host["python"] = "3.11.9"
    t.dist("torch", "2.9.0")
    torch_npu(t, "2.9.0", "2.9.0")
    t.undist("torchvision")
    vllm(t, "0.15.0", "0.15.0rc1")
    return t


def row_91(t: Tree) -> Tree:
    """A healthy machine of CANN 9.1.0."""
    good(t, "9.1.0", "26.1.0")
    t.host["python"] = "3.11.9"
    t.dist("torch", "2.10.0")
    torch_npu(t, "2.10.0.post4", "2.10.0")
    vllm(t, "0.23.0", "0.23.0")
    t.dist("numpy", "2.1.3")
    return t

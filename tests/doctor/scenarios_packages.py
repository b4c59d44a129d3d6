"""Machines whose Python packages do not fit together."""

from __future__ import annotations

from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.tree import (
    SITE,
    A,
    Tree,
    good,
    nnal,
    row_85,
    row_91,
    store,
    torch_npu,
    vllm,
)

LATEST = f"/{A}/ascend-toolkit/latest"

BASE = Options(profiles=("base",))


@scenario("a Python without wheels", {"PY001": "fail"}, options=BASE)
def other_python(t: Tree) -> None:
    t.host["python"] = "3.13.1"


@scenario("packages in another environment", {"PY002": "warn", "PY004": "fail"}, options=BASE)
def other_environment(t: Tree) -> None:
    t.directory("opt/conda/envs/sllm-worker")
    t.env["CONDA_PREFIX"] = "/opt/conda/envs/sllm-worker"
    t.undist("torch_npu")


@scenario("a program of an environment that is not activated", {"PY002": "info"})
def not_activated(t: Tree) -> None:
    t.directory("opt/conda")
    t.env["CONDA_PREFIX"] = "/opt/conda"


@scenario("torch for CUDA", {"PY003": "warn"})
def cuda_torch(t: Tree) -> None:
    t.undist("torch")
    t.dist("torch", "2.5.1+cu124")
    t.dist("nvidia_cudnn_cu12", "9.1.0.70")


@scenario("no torch", {"PY003": "fail"}, options=BASE)
def no_torch(t: Tree) -> None:
    t.undist("torch")


@scenario("no torch_npu", {"PY004": "fail"}, options=BASE, says="not installed")
def no_torch_npu(t: Tree) -> None:
    t.undist("torch_npu")


@scenario("torch_npu without its library", {"PY004": "fail"}, options=BASE)
def hollow_torch_npu(t: Tree) -> None:
    t.remove(f"{SITE[1:]}/torch_npu/lib/libtorch_npu.so")


@scenario("torch 2.4.0 with torch_npu 2.5.1", {"PY005": "fail"}, options=BASE, says="2.4.0")
def no_pair(t: Tree) -> None:
    t.dist("torch", "2.4.0")


@scenario(
    "guide 1: CANN 8.0.0 with torch 2.5.1 and NNAL 8.1.RC1",
    {"PY006": "warn", "NNAL002": "fail"},
    base=lambda t: good(t, "8.0.0", "24.1.0"),
    options=Options(profiles=("base", "vllm")),
)
def first_guide(t: Tree) -> None:
    t.undist("vllm", "vllm_ascend")
    nnal(t, "8.1.RC1")


@scenario(
    "guide 1, with vLLM installed",
    {"PY006": "warn", "NNAL002": "fail", "VLLM002": "fail"},
    base=lambda t: good(t, "8.0.0", "24.1.0"),
)
def first_guide_vllm(t: Tree) -> None:
    nnal(t, "8.1.RC1")


@scenario(
    "guide 1: torch 2.4.0 with torch_npu 2.4.0.post2 on CANN 8.0.0",
    base=lambda t: good(t, "8.0.0", "24.1.0"),
)
def first_guide_store(t: Tree) -> None:
    t.undist("vllm", "vllm_ascend")
    t.dist("torch", "2.4.0")
    torch_npu(t, "2.4.0.post2", "2.4.0")
    store(t)


@scenario("torch_npu 2.4.0 on CANN 8.1.RC1", {"PY006": "warn"}, options=BASE)
def wrong_post(t: Tree) -> None:
    t.dist("torch", "2.4.0")
    torch_npu(t, "2.4.0", "2.4.0")


@scenario(
    "torch_npu 2.5.1 on CANN 9.1.0", {"PY006": "fail", "PY008": "fail"}, base=row_91, options=BASE
)
def crossing(t: Tree) -> None:
    t.dist("torch", "2.5.1")
    torch_npu(t, "2.5.1", "2.5.1")
    t.host["python"] = "3.10.14"


@scenario(
    "guide 2: torch_npu 2.6.0.post3 on CANN 8.2.RC1, a stub first",
    {"PY006": "warn", "ENV004": "fail"},
    base=lambda t: good(t, "8.2.RC1", "25.2.0", abi=1),
    options=BASE,
)
def second_guide(t: Tree) -> None:
    t.undist("vllm", "vllm_ascend")
    t.dist("torch", "2.6.0")
    torch_npu(t, "2.6.0.post3", "2.6.0")
    t.host["python"] = "3.11.9"
    t.env["LD_LIBRARY_PATH"] = f"{LATEST}/runtime/lib64/stub:" + t.env["LD_LIBRARY_PATH"]


@scenario("torchvision of another torch", {"PY007": "warn"})
def other_vision(t: Tree) -> None:
    t.dist("torchvision", "0.21.0")


@scenario("numpy 2 on CANN 8.1", {"PY008": "fail"})
def new_numpy(t: Tree) -> None:
    t.dist("numpy", "2.1.3")


@scenario("a system too old for torch", {"PY009": "fail"})
def old_system(t: Tree) -> None:
    t.host["glibc"] = "2.17"
    torch_npu(t, "2.5.1", "2.5.1")
    t.dist("torch", "2.5.1", tag="manylinux_2_28_aarch64")


@scenario("libstdc++ too old", {"PY010": "fail"}, says="GLIBCXX_3.4.30")
def old_libstdcxx(t: Tree) -> None:
    t.file("lib64/libstdc++.so.6", b"\0GLIBCXX_3.4.28\0")
    t.elf(f"{SITE[1:]}/torch_npu/lib/libtorch_npu.so", versions=["GLIBCXX_3.4.30", "GLIBCXX_3.4.9"])


@scenario("two tritons", {"PY011": "warn"}, base=row_85)
def two_tritons(t: Tree) -> None:
    t.dist("triton", "3.2.0")
    t.dist("triton_ascend", "3.2.0")


@scenario("what CANN imports is missing", {"PY013": "warn"}, says="attrs, sympy")
def no_attrs(t: Tree) -> None:
    t.undist("attrs", "sympy")


@scenario("what tools of CANN import is missing", {"PY013": "info"}, says="absl-py")
def no_absl(t: Tree) -> None:
    t.undist("absl-py")


@scenario("scikit-learn on aarch64", {"PY014": "info"})
def late_libgomp(t: Tree) -> None:
    t.dist("scikit_learn", "1.5.0")


@scenario(
    "an old compiler", {"PY016": "fail"}, options=Options(profiles=("build",)), says="g++ 7.3.0"
)
def old_compiler(t: Tree) -> None:
    t.command("g++ --version", "g++ (GCC) 7.3.0\n")
    t.command("cmake --version", "cmake version 4.0.1\n")
    t.command("ninja --version", "1.11.1\n")
    t.command("git --version", "git version 2.43.0\n")


@scenario("the tools for building", options=Options(profiles=("build",)))
def good_tools(t: Tree) -> None:
    t.command("g++ --version", "g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0\n")
    t.command("cmake --version", "cmake version 3.27.4\n")
    t.command("ninja --version", "1.11.1.git.kitware.jobserver-1\n")
    t.dist("wheel", "0.45.1")
    t.command("git --version", "git version 2.43.0\n")


@scenario(
    "versions of the future",
    {"DRV008": "info", "PY006": "info", "VLLM002": "info"},
    base=lambda t: good(t, "9.5.0", "27.0.0"),
    says="do not know",
)
def future(t: Tree) -> None:
    t.host["python"] = "3.12.4"
    t.dist("torch", "2.14.0")
    torch_npu(t, "2.14.0", "2.14.0")
    vllm(t, "0.30.0", "0.30.0")


@scenario("no Ascend at all")
def nothing(t: Tree) -> None:
    for path in (A, "sys/bus/pci/devices"):
        t.remove(path)
    t.nodes, t.commands, t.env = {}, {}, {"CONDA_PREFIX": "/opt/npu"}
    t.undist("torch_npu", "vllm", "vllm_ascend")
    t.dist("numpy", "2.3.0")


@scenario("an index without encryption", {"PY015": "info"}, says="http://mirror")
def plain_index(t: Tree) -> None:
    t.file("root/.config/pip/pip.conf", "[global]\nindex-url = http://mirror.example/simple\n")


@scenario(
    "the tools for building, without wheel",
    {"PY016": "fail"},
    says="wheel missing",
    options=Options(profiles=("build",)),
)
def no_wheel(t: Tree) -> None:
    good_tools(t)
    t.undist("wheel")


@scenario("pip of another Python", {"PY002": "warn"}, says="/usr/local")
def other_pip(t: Tree) -> None:
    t.env["PATH"] = "/usr/local/bin:/opt/npu/bin"
    t.file("usr/local/bin/pip", "#!/usr/local/bin/python3.10\nimport sys\n")
    t.file("opt/npu/bin/pip", "#!/opt/npu/bin/python3.10\n")


@scenario("pip of this Python")
def own_pip(t: Tree) -> None:
    t.env["PATH"] = "/opt/npu/bin:/usr/local/bin"
    t.file("usr/local/bin/pip", "#!/usr/local/bin/python3.10\nimport sys\n")
    t.file("opt/npu/bin/pip", "#!/opt/npu/bin/python3.10\n")


@scenario("a trusted host", {"PY015": "info"}, says="mirror.example")
def trusted(t: Tree) -> None:
    t.file("etc/pip.conf", "[global]\ntrusted-host = mirror.example\n")


@scenario("numpy 2 on CANN 9.1", base=row_91)
def numpy_of_91(t: Tree) -> None:
    t.dist("numpy", "2.1.3")


@scenario("opencv on aarch64", {"PY014": "info"})
def late_opencv(t: Tree) -> None:
    t.dist("opencv_python_headless", "4.11.0.86")


def on_x86(t: Tree) -> None:
    t.arch = "x86_64"
    good(t)


@scenario("a mirror of pip on x86_64", {"PY015": "info"}, base=on_x86, says="CPU build")
def mirror_x86(t: Tree) -> None:
    t.env["PIP_INDEX_URL"] = "https://mirror.example/simple"

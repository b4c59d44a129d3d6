"""Machines with vLLM, SGLang or devices that do not work."""

from __future__ import annotations

from sllmctl.doctor.checks.deep import COPY, COUNT, IMPORT, PIN
from sllmctl.doctor.checks.vllm import PATCHED
from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.smi_output import cards, render
from tests.doctor.tree import (
    SITE,
    A,
    Tree,
    good,
    row_85,
    torch_npu,
)

PYTHON = "/usr/bin/python3 -c "


@scenario("no NNAL", {"NNAL001": "fail"})
def no_nnal(t: Tree) -> None:
    t.remove(f"{A}/nnal")
    del t.env["ATB_HOME_PATH"]
    t.env["LD_LIBRARY_PATH"] = ":".join(
        e for e in t.env["LD_LIBRARY_PATH"].split(":") if "nnal" not in e
    )


@scenario("NNAL of the other ABI", {"NNAL004": "fail"})
def other_abi(t: Tree) -> None:
    for name in ("ATB_HOME_PATH", "LD_LIBRARY_PATH"):
        t.env[name] = t.env[name].replace("cxx_abi_0", "cxx_abi_1")


@scenario("vllm of another release", {"VLLM001": "fail"}, says="0.7.3")
def other_vllm(t: Tree) -> None:
    t.dist("vllm", "0.9.1+empty")


@scenario("vllm from its main branch", {"VLLM001": "warn"})
def dev_vllm(t: Tree) -> None:
    t.dist("vllm", "0.1.dev1+gabcdef")


@scenario("vllm-ascend on another CANN", {"VLLM002": "fail", "PY006": "fail"}, base=row_85)
def other_row(t: Tree) -> None:
    t.dist("vllm", "0.20.2")
    t.dist("vllm_ascend", "0.20.2rc1", entry_points="[vllm.platform_plugins]\nascend = a:b\n")
    t.dist("torch", "2.10.0")
    torch_npu(t, "2.10.0", "2.10.0")


@scenario("no plugin registered", {"VLLM003": "fail"})
def no_plugin(t: Tree) -> None:
    t.dist("vllm_ascend", "0.7.3.post1")


@scenario("VLLM_PLUGINS without ascend", {"VLLM003": "fail"}, says="VLLM_PLUGINS")
def other_plugins(t: Tree) -> None:
    t.env["VLLM_PLUGINS"] = "lora_filesystem_resolver"


@scenario("vllm-ascend without its native part", {"VLLM004": "fail"})
def no_native(t: Tree) -> None:
    t.remove(f"{SITE[1:]}/vllm_ascend/vllm_ascend_C.cpython-310-aarch64-linux-gnu.so")


@scenario("vllm-ascend built for A3", {"VLLM004": "fail"}, says="A3")
def other_chip(t: Tree) -> None:
    t.file(f"{SITE[1:]}/vllm_ascend/_build_info.py", "__device_type__ = 'A3'\n")


@scenario("a patch applied by half", {"VLLM006": "fail"}, says="2 of 8")
def half_patched(t: Tree) -> None:
    for name in ("vllm/config.py", "vllm/worker/worker.py"):
        t.file(f"{SITE[1:]}/{name}", f"# {PATCHED[name]}\n")


@scenario("a patch applied whole")
def patched(t: Tree) -> None:
    for name, word in PATCHED.items():
        t.file(f"{SITE[1:]}/{name}", f"# {word}\n")


def with_sglang(t: Tree) -> None:
    """The second guide's machine, as it should have been."""
    good(t, "8.2.RC1", "25.2.0", abi=1)
    t.undist("vllm", "vllm_ascend")
    t.host["python"] = "3.11.9"
    t.dist("torch", "2.6.0")
    torch_npu(t, "2.6.0", "2.6.0")
    t.dist("torchvision", "0.21.0")
    t.dist("sglang", "0.5.3rc0")
    t.dist("sgl_kernel_npu", "0.1.0")
    t.dist("deep_ep", "1.0.0+607b0002.cann.8.2.RC1", files=["deep_ep/__init__.py"])
    t.elf(f"{SITE[1:]}/deep_ep/deep_ep_cpp.cpython-311-aarch64-linux-gnu.so")
    t.link(
        f"{SITE[1:]}/deep_ep_cpp.cpython-311-aarch64-linux-gnu.so",
        "deep_ep/deep_ep_cpp.cpython-311-aarch64-linux-gnu.so",
    )
    t.directory(f"{SITE[1:]}/deep_ep/vendors/hwcomputing/op_impl/ai_core/tbe/kernel/ascend910b")


@scenario("SGLang, all in order", base=with_sglang)
def good_sglang(t: Tree) -> None:
    pass


@scenario("SGLang on another Python", {"SGL001": "warn"}, base=with_sglang)
def sglang_python(t: Tree) -> None:
    t.host["python"] = "3.10.14"


@scenario("deep_ep of another CANN", {"SGL002": "fail"}, base=with_sglang, says="9.0.0")
def other_deep_ep(t: Tree) -> None:
    t.undist("deep_ep")
    t.dist("deep_ep", "1.0.0+607b0002.cann.9.0.0.b250")


@scenario("deep_ep_cpp out of reach", {"SGL002": "fail"}, base=with_sglang, says="deep_ep_cpp")
def unlinked(t: Tree) -> None:
    t.remove(f"{SITE[1:]}/deep_ep_cpp.cpython-311-aarch64-linux-gnu.so")


@scenario("deep_ep built for A3", {"SGL003": "fail"}, base=with_sglang)
def a3_deep_ep(t: Tree) -> None:
    kernel = f"{SITE[1:]}/deep_ep/vendors/hwcomputing/op_impl/ai_core/tbe/kernel"
    t.remove(f"{kernel}/ascend910b")
    t.directory(f"{kernel}/ascend910_93")


DEEP = Options(profiles=("base",), deep=True)


def _children(
    t: Tree,
    imported: int | None = 0,
    count: str = "8",
    copied: int | None = 0,
    pinned: int | None = 0,
) -> None:
    t.command(PYTHON + PIN, "ok\n", pinned, "RuntimeError: aclrtMallocHost failed: 207001\n")
    t.command(
        PYTHON + IMPORT,
        "2.5.1\n",
        imported,
        ""
        if imported == 0
        else "Traceback\nImportError: libhccl.so: cannot open shared object file\n"
        "[ERROR] 2025-06-09-23:13:26 (PID:1, Device:-1, RankID:-1) ERR99999 UNKNOWN\n",
    )
    t.command(PYTHON + COUNT, f"{count}\n")
    t.command(PYTHON + COPY, "copied\n", copied, "RuntimeError: 507899\n")


@scenario("devices that work", options=DEEP)
def deep(t: Tree) -> None:
    _children(t)


@scenario("torch_npu cannot be imported", {"DEEP001": "fail"}, options=DEEP, says="libhccl.so")
def no_import(t: Tree) -> None:
    _children(t, imported=1)


@scenario("cards that torch_npu does not see", {"DEEP002": "fail"}, options=DEEP)
def unseen(t: Tree) -> None:
    _children(t, count="7")


@scenario("a card that hangs", {"DEEP003": "fail"}, options=DEEP, says="does not end")
def hanging(t: Tree) -> None:
    _children(t, copied=None)


@scenario("memory that cannot be pinned", {"DEEP004": "fail"}, options=DEEP, says="207001")
def not_pinned(t: Tree) -> None:
    _children(t, pinned=1)


@scenario("an image for A3 on A2", {"VLLM005": "warn"}, says="made for A3")
def other_image(t: Tree) -> None:
    t.env["SOC_VERSION"] = "ascend910_9391"


@scenario("an image for A2 on A2", base=row_85)
def right_image(t: Tree) -> None:
    t.env["SOC_VERSION"] = "ascend910b1"
    t.file(f"{A}/cann-8.5.0/aarch64-linux/ascend_ops_install.info",
           "package_name=Ascend-cann-910b-ops\nversion=8.5.0\n")  # fmt: skip


@scenario("operators of A3 beside those of A2", {"VLLM005": "warn"}, base=row_85)
def other_package(t: Tree) -> None:
    t.file(f"{A}/cann-8.5.0/aarch64-linux/ascend_ops_install.info",
           "package_name=Ascend-cann-A3-ops\nversion=8.5.0\n")  # fmt: skip


@scenario("triton-ascend of another row", {"PY011": "warn"}, base=row_85, says="3.2.0")
def other_triton(t: Tree) -> None:
    t.dist("triton_ascend", "3.2.1")


@scenario("SGLang without its operators", {"SGL002": "fail"}, base=with_sglang)
def no_sgl_kernel(t: Tree) -> None:
    t.undist("sgl_kernel_npu")


KERNELS = Options(profiles=("base", "sglang"), source="/root/sgl-kernel-npu")
HEAD, TAGGED = "f425bdf" + "0" * 33, "a1b2c3d" + "0" * 33


def _clone(t: Tree, head: str) -> None:
    git = "root/sgl-kernel-npu/.git"
    t.directory("root/sgl-kernel-npu/python/deep_ep")
    t.file(f"{git}/HEAD", f"{head}\n")
    t.file(f"{git}/refs/heads/main", f"{HEAD}\n")
    t.file(
        f"{git}/packed-refs",
        "# pack-refs with: peeled fully-peeled sorted\n"
        f"{'e' * 40} refs/tags/2025.09.01\n^{TAGGED}\n",
    )


@scenario(
    "guide 2: sgl-kernel-npu cloned without a tag",
    {"SGL004": "warn"},
    base=with_sglang,
    options=KERNELS,
    says="torch 2.6.0, CANN 8.2.RC1",
)
def no_tag(t: Tree) -> None:
    _clone(t, "ref: refs/heads/main")


@scenario("sgl-kernel-npu at a tag", base=with_sglang, options=KERNELS)
def tagged(t: Tree) -> None:
    _clone(t, TAGGED)


@scenario(
    "310P cards under SGLang",
    {"DRV011": "fail", "CANN005": "fail"},
    base=with_sglang,
    says="SGLang",
)
def sglang_310p(t: Tree) -> None:
    t.command("npu-smi info", render("25.2.0", cards(name="310P3")))

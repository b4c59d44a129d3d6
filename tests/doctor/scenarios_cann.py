"""Machines whose CANN or environment is as no one wants it."""

from __future__ import annotations

import os

from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.smi_output import cards, render
from tests.doctor.tree import (
    A,
    Tree,
    good,
    nnal,
    row_85,
    row_91,
    sourced,
)

TK = f"{A}/ascend-toolkit/8.1.RC1"

LATEST = f"/{A}/ascend-toolkit/latest"

BASE = Options(profiles=("base",))


@scenario("healthy 8.1.RC1")
def healthy(t: Tree) -> None:
    pass


@scenario("healthy 8.5.0 with the environment sourced twice", {"ENV005": "info"}, base=row_85)
def sourced_twice(t: Tree) -> None:
    """https://github.com/vllm-project/vllm-ascend/issues/6271"""
    t.env["LD_LIBRARY_PATH"] += ":" + t.env["LD_LIBRARY_PATH"].replace(
        f"/{A}/cann-8.5.0", f"{LATEST}"
    )
    t.env["ASCEND_TOOLKIT_LATEST_HOME"] = LATEST
    t.env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"


@scenario("healthy 9.1.0", base=row_91)
def healthy_91(t: Tree) -> None:
    pass


@scenario("nothing sourced", {"ENV001": "fail", "NNAL003": "fail"}, says="was not sourced")
def nothing_sourced(t: Tree) -> None:
    t.env = {"CONDA_PREFIX": "/opt/npu"}


@scenario(
    "exports of a guide beside set_env.sh", {"CANN002": "info", "ENV002": "fail", "ENV003": "warn"}
)
def mixed_roots(t: Tree) -> None:
    other = Tree(t.root)
    other.arch = t.arch
    good(other, "8.0.0", "25.0.rc1.1")
    t.link(f"{A}/ascend-toolkit/latest", "8.1.RC1")
    t.link(f"{A}/nnal/atb/latest", "8.1.RC1")
    t.env = sourced(LATEST, 0, t.arch)
    old = f"/{A}/ascend-toolkit/8.0.0"
    t.env["ASCEND_TOOLKIT_HOME"] = old
    t.env["LD_LIBRARY_PATH"] = f"{old}/lib64:" + t.env["LD_LIBRARY_PATH"]
    t.env["ASCEND_OPP_PATH"] = f"{old}/opp"
    t.env["ASCEND_AICPU_PATH"] = f"{old}/aicpu"
    t.env["PYTHONPATH"] = f"{old}/python/site-packages:" + t.env["PYTHONPATH"]


@scenario("latest leads nowhere", {"CANN002": "fail"}, says="leads nowhere")
def dangling(t: Tree) -> None:
    t.link(f"{A}/ascend-toolkit/latest", "8.2.RC1")


@scenario("a second version installed over the first", {"CANN002": "warn"})
def overwritten(t: Tree) -> None:
    t.file(f"{TK}/toolkit/version.info", "Version=8.2.0.0.201\nversion_dir=8.2.RC1\n")


@scenario("no CANN", {"CANN001": "fail"}, options=BASE)
def no_cann(t: Tree) -> None:
    t.remove(f"{A}/ascend-toolkit")
    t.env = {"CONDA_PREFIX": "/opt/npu"}


@scenario("CANN without its compiler", {"CANN004": "fail"}, says="compiler")
def incomplete(t: Tree) -> None:
    t.remove(f"{TK}/compiler")


@scenario("operators for another chip", {"CANN005": "fail"}, says="ascend910b")
def other_operators(t: Tree) -> None:
    kernel = f"{TK}/opp/built-in/op_impl/ai_core/tbe/kernel"
    t.remove(f"{kernel}/ascend910b")
    t.directory(f"{kernel}/ascend310p")


@scenario("operators of another version", {"CANN005": "fail"}, says="8.0.0")
def old_operators(t: Tree) -> None:
    t.change(
        f"{TK}/version.cfg",
        "opp_kernel_running_version=[7.7.0.1.238:8.1.RC1]",
        "opp_kernel_running_version=[7.6.0.1.220:8.0.0]",
    )


@scenario("CANN of another machine", {"CANN006": "fail"}, says="x86_64")
def other_machine(t: Tree) -> None:
    t.change(f"{TK}/aarch64-linux/ascend_toolkit_install.info", "arch=aarch64", "arch=x86_64")
    t.elf(f"{TK}/lib64/libascendcl.so", "x86_64")


@scenario("CANN closed to this user", {"CANN007": "fail"})
def closed(t: Tree) -> None:
    t.nodes[f"/{TK}/lib64"] = {"kind": "dir", "mode": 0o750, "uid": 0, "gid": 0}
    t.host |= {"euid": 1001, "groups": [1000, 1001], "dac_override": False}


@scenario("a stub before the driver", {"ENV004": "fail"})
def stub(t: Tree) -> None:
    t.env["LD_LIBRARY_PATH"] = f"{LATEST}/runtime/lib64/stub:" + t.env["LD_LIBRARY_PATH"]


@scenario("a stub behind the driver", {"ENV004": "info"})
def harmless_stub(t: Tree) -> None:
    t.env["LD_LIBRARY_PATH"] += f":{LATEST}/runtime/lib64/stub"


@scenario("an empty entry in LD_LIBRARY_PATH", {"ENV005": "warn"})
def empty_entry(t: Tree) -> None:
    t.env["LD_LIBRARY_PATH"] += ":"


@scenario(
    "a container with one card, asked for by the host's number",
    {"ENV006": "fail"},
    says="go from 0 to 0",
)
def host_number(t: Tree) -> None:
    t.nodes = {name: node for name, node in t.nodes.items() if name[-1] not in "01234567"}
    t.node("dev/davinci5")
    t.command("npu-smi info", render("25.0.rc1.1", cards()[5:6]))
    t.env["ASCEND_RT_VISIBLE_DEVICES"] = "5"


for _value in ("1, 2", "3,1", "0-3", '"0"', "0,0"):

    @scenario(f"ASCEND_RT_VISIBLE_DEVICES={_value}", {"ENV006": "fail"})
    def bad_devices(t: Tree, value: str = _value) -> None:
        t.env["ASCEND_RT_VISIBLE_DEVICES"] = value


@scenario("ASCEND_RT_VISIBLE_DEVICES=", {"ENV006": "info"})
def no_devices(t: Tree) -> None:
    t.env["ASCEND_RT_VISIBLE_DEVICES"] = ""


@scenario("ASCEND_RT_VISIBLE_DEVICES=0,3")
def some_devices(t: Tree) -> None:
    t.env["ASCEND_RT_VISIBLE_DEVICES"] = "0,3"


@scenario("a flood of logs", {"ENV007": "warn"})
def flood(t: Tree) -> None:
    t.env |= {"ASCEND_SLOG_PRINT_TO_STDOUT": "1", "ASCEND_GLOBAL_LOG_LEVEL": "1"}


@scenario("PYTHONPATH overwritten", {"ENV008": "fail"})
def no_python_path(t: Tree) -> None:
    t.env["PYTHONPATH"] = "/root/project"


@scenario("PYTHONPATH of another Python", {"ENV008": "warn"})
def other_python_path(t: Tree) -> None:
    t.env["PYTHONPATH"] += ":/usr/lib/python3.8/site-packages"


@scenario("debugging left on", {"ENV009": "info"})
def debugging(t: Tree) -> None:
    t.env["ASCEND_LAUNCH_BLOCKING"] = "1"


@scenario("LD_PRELOAD of a missing library", {"ENV010": "fail"}, says="libjemalloc")
def preload(t: Tree) -> None:
    t.env["LD_PRELOAD"] = "/usr/lib/libjemalloc.so.2"


@scenario("LD_PRELOAD of another machine's library", {"ENV010": "fail"})
def foreign_preload(t: Tree) -> None:
    t.elf("usr/lib/libjemalloc.so.2", "x86_64")
    t.env["LD_PRELOAD"] = "/usr/lib/libjemalloc.so.2"


@scenario("text in another encoding", {"ENV011": "info"})
def encoding(t: Tree) -> None:
    t.host["encoding"] = "ansi_x3.4-1968"


@scenario("NNAL of a neighbouring release", {"NNAL002": "warn"}, base=row_85)
def neighbouring(t: Tree) -> None:
    nnal(t, "8.5.1")


@scenario("component files with numbers of their own")
def own_numbers(t: Tree) -> None:
    t.file(f"{TK}/runtime/version.info", "Version=7.7.0.1.238\n")
    t.file(f"{TK}/opp/version.info", "Version=8.1.0.0.201\ntimestamp=20250724_194044950\n")


@scenario("two versions installed", {"CANN002": "info"}, base=row_91)
def two_versions(t: Tree) -> None:
    t.directory(f"{A}/cann-9.0.0/opp")


@scenario("old logs of many GB", {"ENV007": "info"}, says="5 GB")
def old_logs(t: Tree) -> None:
    t.file("root/ascend/log/debug/plog/plog-1.log", b"x")
    os.truncate(t.root / "root/ascend/log/debug/plog/plog-1.log", 6 << 30)


@scenario("set_env.sh in ~/.bashrc alone", {"ENV001": "fail", "NNAL003": "fail"})
def in_bashrc(t: Tree) -> None:
    t.env = {"CONDA_PREFIX": "/opt/npu"}
    t.file("root/.bashrc", "source /usr/local/Ascend/ascend-toolkit/set_env.sh\n")


@scenario("torch_npu kept from loading", {"ENV009": "info"}, says="AUTOLOAD")
def no_autoload(t: Tree) -> None:
    t.env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


@scenario("logs of HCCL", {"ENV007": "warn"}, says="HCCL_ENTRY_LOG_ENABLE")
def hccl_logs(t: Tree) -> None:
    t.env["HCCL_ENTRY_LOG_ENABLE"] = "1"

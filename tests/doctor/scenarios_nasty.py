"""Machines that nobody means to have: each gives a finding, or is passed over with a reason."""

from __future__ import annotations

from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.smi_output import cards, render
from tests.doctor.tree import A, Tree

BASE = Options(profiles=("base",))
USER = {"euid": 1001, "groups": [1000, 1001], "dac_override": False}
INFO = f"{A}/ascend-toolkit/8.1.RC1/aarch64-linux/ascend_toolkit_install.info"


@scenario("links of CANN that lead to each other", {"CANN002": "fail"}, says="leads nowhere")
def link_loop(t: Tree) -> None:
    t.link(f"{A}/cann", "ascend-toolkit/latest")
    t.link(f"{A}/ascend-toolkit/latest", "../cann")


@scenario("a CANN below itself")
def recursive_root(t: Tree) -> None:
    t.link(f"{A}/ascend-toolkit/8.1.RC1/lib64/self", "..")
    t.link(f"{A}/ascend-toolkit/8.1.RC1/opp/up", "../..")


@scenario(
    "/usr/local/Ascend closed to this user",
    {"DRV004": "warn", "CANN001": "fail", "ENV005": "info"},
    options=BASE,
    says="may not look into /usr/local/Ascend",
)
def closed(t: Tree) -> None:
    t.nodes[f"/{A}"] = {"kind": "dir", "mode": 0o700, "uid": 0, "gid": 0}
    t.host |= USER


@scenario("version files of a Windows editor")
def windows_files(t: Tree) -> None:
    for path in (INFO, f"{A}/driver/version.info", "etc/ascend_install.info",
                 f"{A}/ascend-toolkit/8.1.RC1/version.cfg"):  # fmt: skip
        t.file(path, ("\ufeff# 说明\n" + t.read(path)).replace("\n", "\r\n"))


@scenario("npu-smi in another language", {"DRV009": "warn"}, says="\ufffd")
def other_language(t: Tree) -> None:
    garbled = "正常".encode("gbk").decode("utf-8", "replace")
    t.command("npu-smi info", render("25.0.rc1.1", cards(health=garbled)))


@scenario("npu-smi killed half-way", {"DRV009": "warn"}, says="lists no card")
def killed_tool(t: Tree) -> None:
    t.command("npu-smi info", render("25.0.rc1.1", cards())[:300], -9, "Killed")


@scenario("LD_LIBRARY_PATH of colons and relative paths", {"ENV005": "warn"})
def colons(t: Tree) -> None:
    t.env["LD_LIBRARY_PATH"] = ":::" + t.env["LD_LIBRARY_PATH"] + "::.:lib:"


@scenario("a list of cards that ends in a line break", {"ENV006": "fail"})
def line_break(t: Tree) -> None:
    t.env["ASCEND_RT_VISIBLE_DEVICES"] = "0\n"


@scenario("a list of cards in wide digits", {"ENV006": "fail"})
def wide_digits(t: Tree) -> None:
    t.env["ASCEND_RT_VISIBLE_DEVICES"] = "０,１"


@scenario("a proxy that is no address", {"NET001": "warn", "NET002": "warn"}, options=BASE)
def odd_proxy(t: Tree) -> None:
    t.env |= {"http_proxy": "http://u:p@[::1", "no_proxy": ",,;,[", "HTTPS_PROXY": "://"}


@scenario("nothing set, not even HOME", {"ENV001": "fail"}, options=BASE)
def no_home(t: Tree) -> None:
    t.env = {}
    t.host |= {"home": "", "user": "", "cwd": "/", "sys_path": t.host["sys_path"]}


@scenario("a /proc/meminfo without what is free", {"MEM004": "info"})
def odd_meminfo(t: Tree) -> None:
    t.file("proc/meminfo", "MemTotal: much\nMemAvailable:\nSwapTotal: 8 kB\nSwapFree: 4 kB\n")
    t.file("proc/self/cgroup", "no cgroup\n")


@scenario("version files that are folders", {"DRV004": "info", "DRV005": "info"})
def folders(t: Tree) -> None:
    for path in (f"{A}/driver/version.info", "etc/ascend_install.info"):
        t.remove(path)
        t.directory(path)


@scenario("an index that lists itself", {"HUB003": "fail"}, says="config.json",
          options=Options(profiles=("convert",), model="/data/models"))  # fmt: skip
def odd_model(t: Tree) -> None:
    t.file("data/models/model.safetensors.index.json", '{"weight_map": {"a": 3, "b": ["c"]}}')

"""Machines that nobody means to have: each gives a finding, or is passed over with a reason."""

from __future__ import annotations

from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.smi_output import cards, render
from tests.doctor.tree import SITE, A, Tree, nnal, row_91

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


@scenario(
    "a container without anything",
    {"DRV002": "fail", "DRV004": "warn", "DRV007": "fail", "CTR001": "fail", "ENV005": "info"},
    options=BASE,
)
def bare_container(t: Tree) -> None:
    t.file(".dockerenv")
    t.nodes = {}
    t.command("npu-smi info", code=127)
    t.remove(f"{A}/driver", f"{A}/firmware")


NESTED = "[" * 100_000
MODELS = "http://localhost:8000/v1/models"


@scenario("JSON that is nested without end", {"HUB003": "fail"}, says="cannot be read",
          options=Options(profiles=("base",), model="/data/models",
                          base_url="http://localhost:8000/v1", served_model="m"))  # fmt: skip
def nested(t: Tree) -> None:
    t.file("data/models/config.json", "{}")
    t.file("data/models/model.safetensors.index.json", NESTED)
    t.file(f"{SITE[1:]}/torch_npu-2.5.1.dist-info/direct_url.json", NESTED)
    t.more |= {"ports": [8000], "http": {MODELS: [200, NESTED]}}


@scenario("VLLM_VERSION of another release", {"VLLM001": "fail"}, says="VLLM_VERSION says 0.9.1")
def other_vllm_version(t: Tree) -> None:
    t.env["VLLM_VERSION"] = "0.9.1"


@scenario("CANN in the conda environment, not sourced", {"ENV001": "fail"}, options=BASE)
def conda_cann(t: Tree) -> None:
    t.directory("opt/npu/Ascend")
    (t.root / A / "ascend-toolkit").rename(t.root / "opt/npu/Ascend/ascend-toolkit")
    t.env = {"CONDA_PREFIX": "/opt/npu"}


@scenario("an index that lists itself", {"HUB003": "fail"}, says="config.json",
          options=Options(profiles=("convert",), model="/data/models"))  # fmt: skip
def odd_model(t: Tree) -> None:
    t.file("data/models/model.safetensors.index.json", '{"weight_map": {"a": 3, "b": ["c"]}}')


@scenario("version files with NULs at the ends of lines")
def nuls(t: Tree) -> None:
    for path in (INFO, f"{A}/driver/version.info", "etc/ascend_install.info"):
        t.file(path, t.read(path).replace("\n", "\0\n"))


@scenario("a driver's version of 60,000 digits", {"DRV006": "info", "DRV008": "info"})
def endless_version(t: Tree) -> None:
    t.file(f"{A}/driver/version.info", "Version=" + "9" * 60_000)


@scenario("folders that are called cann, or were one", {"ENV005": "info"})
def called_cann(t: Tree) -> None:
    t.directory("home/me/cann/tools")
    t.env["PYTHONPATH"] = "/home/me/cann/tools:" + t.env["PYTHONPATH"]
    gone = f"/{A}/ascend-toolkit/8.0.0/lib64"
    t.env["LD_LIBRARY_PATH"] = f"{gone}:{t.env['LD_LIBRARY_PATH']}"


@scenario(
    "ASCEND_AICPU_PATH of another CANN",
    {"CANN002": "info", "ENV002": "fail"},
    says="lead to different CANN: 8.0.0, 8.1.RC1",
)
def other_aicpu(t: Tree) -> None:
    t.directory(f"{A}/ascend-toolkit/8.0.0/opp")
    t.env["ASCEND_AICPU_PATH"] = f"/{A}/ascend-toolkit/8.0.0"


@scenario(
    "two CANN, `latest` dangling, nothing sourced",
    {"CANN002": "fail", "ENV001": "fail"},
    options=BASE,
    says="CANN 8.1.RC1 is installed",
)
def two_roots(t: Tree) -> None:
    t.directory(f"{A}/ascend-toolkit/8.0.0/lib64")
    t.link(f"{A}/ascend-toolkit/latest", "8.2.RC1")
    t.env = {}


@scenario(
    "a CANN that is half installed",
    {"CANN004": "fail", "ENV001": "fail", "ENV005": "info"},
    options=BASE,
    says="lacks lib64/libascendcl.so",
)
def half_installed(t: Tree) -> None:
    t.remove(*(f"{A}/ascend-toolkit/8.1.RC1/{part}" for part in ("lib64", "runtime", "opp")))


@scenario(
    "ascend-toolkit closed to this user",
    {"CANN001": "fail", "ENV005": "info"},
    options=BASE,
    says="may not look into /usr/local/Ascend/ascend-toolkit",
)
def closed_toolkit(t: Tree) -> None:
    t.nodes[f"/{A}/ascend-toolkit"] = {"kind": "dir", "mode": 0o700, "uid": 0, "gid": 0}
    t.host |= USER


@scenario(
    "a version of CANN closed to this user",
    {"CANN007": "fail", "ENV005": "info"},
    options=BASE,
    says="may not read /usr/local/Ascend/ascend-toolkit/8.1.RC1",
)
def closed_root(t: Tree) -> None:
    t.nodes[f"/{A}/ascend-toolkit/8.1.RC1"] = {"kind": "dir", "mode": 0o750, "uid": 0, "gid": 0}
    t.host |= USER


@scenario("`latest` of NNAL leads nowhere", {"NNAL003": "fail", "ENV005": "info"},
          says="nnal/atb/latest leads nowhere")  # fmt: skip
def dangling_nnal(t: Tree) -> None:
    t.link(f"{A}/nnal/atb/latest", "8.2.RC1")


@scenario("ATB_HOME_PATH of an NNAL that is gone", {"NNAL003": "fail"},
          says="ATB_HOME_PATH leads nowhere")  # fmt: skip
def gone_nnal(t: Tree) -> None:
    t.env["ATB_HOME_PATH"] = f"/{A}/nnal/atb/8.0.0/atb/cxx_abi_0"


@scenario("npu-smi lists fewer chips than /dev has", {"DRV009": "info"}, says="6 chips, /dev has 8")
def fewer_rows(t: Tree) -> None:
    t.command("npu-smi info", render("25.0.rc1.1", cards(6)))


@scenario("vllm-ascend of an older layout, built for A3", {"VLLM004": "fail"}, says="for A3")
def older_build_info(t: Tree) -> None:
    t.file(f"{SITE[1:]}/vllm_ascend/_build_info.py", "__soc_version__ = 'ASCEND910_9391'\n")


@scenario("vllm-ascend built for what is not known here")
def future_build_info(t: Tree) -> None:
    t.file(f"{SITE[1:]}/vllm_ascend/_build_info.py", "__device_type__ = 'A7'\n")


@scenario(
    "a CANN to come under vllm-ascend",
    {"DRV008": "info", "PY006": "info", "VLLM002": "info"},
    base=row_91,
)
def new_cann(t: Tree) -> None:
    root = f"{A}/cann-9.1.0/aarch64-linux"
    for name in ("toolkit", "ops"):
        t.change(f"{root}/ascend_{name}_install.info", "version=9.1.0", "version=9.5.0")
    t.remove(f"{A}/nnal")
    nnal(t, "9.5.0")


@scenario(
    "metadata that is no metadata",
    {"VLLM003": "fail"},
)
def broken_metadata(t: Tree) -> None:
    site = SITE[1:]
    for name in ("torch-2.5.1", "torch_npu-2.5.1", "~umpy-1.26.4", "x-", ""):
        t.file(f"{site}/{name}.dist-info/METADATA", b"\xff\xfe\0")
    t.file(f"{site}/vllm_ascend-0.7.3.post1.dist-info/entry_points.txt", b"\xff[[[\n=\n[vllm.pl")
    t.file(f"{site}/broken.dist-info/METADATA", "Name: \n")


@scenario("a storage path whose file system counts nothing", options=Options(storage_path="/odd"))
def counts_nothing(t: Tree) -> None:
    t.directory("odd")
    t.more["space"]["/odd"] = [0, 0, 0, 0]

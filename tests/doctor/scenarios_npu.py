"""Machines whose cards, driver, CANN, environment or packages are as no one wants them."""

from __future__ import annotations

from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.smi_output import cards, render
from tests.doctor.tree import (
    SITE,
    A,
    Tree,
    good,
    nnal,
    row_85,
    row_91,
    sourced,
    store,
    torch_npu,
    vllm,
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


@scenario("no card", {"DRV001": "fail"}, says="no Ascend card")
def no_card(t: Tree) -> None:
    t.remove("sys/bus/pci/devices")
    t.directory("sys/bus/pci/devices")
    t.file("sys/bus/pci/devices/0000:01:00.0/vendor", "0x19e5\n")
    t.file("sys/bus/pci/devices/0000:01:00.0/device", "0xa222\n")  # a network card
    t.nodes = {}
    t.command("npu-smi info", code=127)


@scenario("a container without device nodes", {"DRV002": "fail", "CTR001": "fail"})
def no_nodes(t: Tree) -> None:
    t.file(".dockerenv")
    t.nodes = {}


@scenario("a host without its driver loaded", {"DRV002": "fail"}, says="not loaded")
def not_loaded(t: Tree) -> None:
    t.nodes = {}


@scenario("a folder in place of a device", {"DRV002": "fail"}, says="not a device")
def folder_node(t: Tree) -> None:
    t.node("dev/hisi_hdc", kind="dir")


@scenario("a user outside of the group", {"DRV003": "fail"})
def no_group(t: Tree) -> None:
    t.host |= {"euid": 1001, "groups": [1001], "dac_override": False}


@scenario("root without DAC_OVERRIDE in a container", {"DRV003": "fail"})
def no_capability(t: Tree) -> None:
    t.file(".dockerenv")
    t.file("usr/local/bin/npu-smi")
    t.file("usr/local/dcmi/libdcmi.so")
    t.host |= {"dac_override": False}


@scenario("no version.info of the driver", {"DRV004": "warn"})
def no_driver_version(t: Tree) -> None:
    t.remove(f"{A}/driver/version.info")


@scenario("a driver installed halfway", {"DRV005": "warn"})
def halfway(t: Tree) -> None:
    t.change("etc/ascend_install.info", "complete", "failed")


@scenario("firmware too old for the driver", {"DRV006": "fail"}, says="7.5.0.1.129")
def old_firmware(t: Tree) -> None:
    t.change(f"{A}/driver/version.info", "[7.0.0,7.7.99]", "[7.6.0,7.7.99]")
    t.change(f"{A}/firmware/version.info", "7.7.0.1.231", "7.5.0.1.129")


BOARD = "npu-smi info -t board -i 0"


@scenario("npu-smi finds the firmware wrong", {"DRV006": "fail"}, says="npu-smi says")
def firmware_by_tool(t: Tree) -> None:
    t.remove(f"{A}/firmware")
    t.command(BOARD, "\tNPU ID                         : 0\n\tCompatibility              : NOK\n")


@scenario("npu-smi finds the firmware right")
def good_firmware_by_tool(t: Tree) -> None:
    t.remove(f"{A}/firmware")
    t.command(BOARD, "\tNPU ID                         : 0\n\tCompatibility              : OK\n")


@scenario("driver libraries not mounted", {"DRV007": "fail"})
def no_driver_libraries(t: Tree) -> None:
    t.remove(f"{A}/driver/lib64/driver/libascend_hal.so")


@scenario("driver libraries out of reach", {"DRV007": "fail"}, says="nothing leads")
def unreachable_driver(t: Tree) -> None:
    entries = t.env["LD_LIBRARY_PATH"].split(":")
    t.env["LD_LIBRARY_PATH"] = ":".join(e for e in entries if "/driver/" not in e)


@scenario("a driver too old for CANN", {"DRV008": "fail"}, base=row_91, says="too old")
def old_driver(t: Tree) -> None:
    t.change(f"{A}/driver/version.info", "Version=26.1.0", "Version=24.1.rc1")
    t.change(f"{A}/firmware/version.info", "[26.1,26.1.]", "[24.1,24.1.]")


@scenario("a driver older than any that was tested", {"DRV008": "warn"})
def older_driver(t: Tree) -> None:
    t.change(f"{A}/driver/version.info", "Version=25.0.rc1.1", "Version=24.1.rc1")
    t.change(f"{A}/firmware/version.info", "[25.0,25.0.]", "[24.1,24.1.]")


@scenario("a card in alarm", {"DRV009": "fail"}, says="Alarm")
def alarm(t: Tree) -> None:
    chips = cards()
    chips[3]["health"] = "Alarm"
    t.command("npu-smi info", render("25.0.rc1.1", chips))


@scenario("npu-smi hangs", {"DRV009": "warn"}, says="does not answer")
def hangs(t: Tree) -> None:
    t.command("npu-smi info", code=None)


@scenario("no npu-smi", {"DRV009": "warn"}, says="not here")
def no_smi(t: Tree) -> None:
    t.command("npu-smi info", code=127)


@scenario("a card held by another container", {"DRV010": "fail"}, says="-8020")
def held(t: Tree) -> None:
    t.command(
        "npu-smi info",
        "DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\n"
        "dcmi model initialized failed, because the device is used. ret is -8020\n",
        code=1,
    )


@scenario("a driver that cannot be reached", {"DRV010": "fail"}, says="-8005")
def unreachable(t: Tree) -> None:
    t.command("npu-smi info", "dcmi module initialize failed. ret is -8005\n", code=1)


@scenario("first-generation cards", {"DRV011": "fail"}, says="910ProB")
def first_generation(t: Tree) -> None:
    t.command("npu-smi info", render("25.0.rc1.1", cards(name="910ProB")))


@scenario("310P cards", {"DRV011": "warn", "CANN005": "fail"}, says="bfloat16")
def inference_cards(t: Tree) -> None:
    t.command("npu-smi info", render("25.0.rc1.1", cards(name="310P3")))


@scenario("950 cards")
def new_cards(t: Tree) -> None:
    t.command("npu-smi info", render("25.0.rc1.1", cards(name="Ascend950PR")))


@scenario("cards in use", {"DRV012": "info"}, says="in use")
def busy(t: Tree) -> None:
    t.command("npu-smi info", render("25.0.rc1.1", cards(), [(4, 0, 1601114, "python", 18429)]))


@scenario(
    "a model larger than all cards",
    {"DRV012": "warn"},
    options=Options(model="/data/models/Qwen/Qwen3-8B"),
)
def too_large(t: Tree) -> None:
    t.file("data/models/Qwen/Qwen3-8B/config.json", "{}")
    t.file("data/models/Qwen/Qwen3-8B/model.safetensors", b"\0" * (3 << 20))
    t.command("npu-smi info", render("25.0.rc1.1", cards(1, used=65535)))
    t.nodes = {name: node for name, node in t.nodes.items() if name[-1] not in "1234567"}


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
    says="counted from 0",
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


@scenario("an accelerator of a kind to come", {"DRV011": "info"}, says="not known")
def unknown_chip(t: Tree) -> None:
    for device in (t.root / "sys/bus/pci/devices").iterdir():
        (device / "device").write_text("0xd900\n")
        (device / "class").write_text("0x120000\n")
    t.command("npu-smi info", render("25.0.rc1.1", cards(name="Ascend1000")))


@scenario("NNAL of a neighbouring release", {"NNAL002": "warn"}, base=row_85)
def neighbouring(t: Tree) -> None:
    nnal(t, "8.5.1")


@scenario("component files with numbers of their own")
def own_numbers(t: Tree) -> None:
    t.file(f"{TK}/runtime/version.info", "Version=7.7.0.1.238\n")
    t.file(f"{TK}/opp/version.info", "Version=8.1.0.0.201\ntimestamp=20250724_194044950\n")


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
    t.more["ports"] = [8073]


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


@scenario("two versions installed", {"CANN002": "info"}, base=row_91)
def two_versions(t: Tree) -> None:
    t.directory(f"{A}/cann-9.0.0/opp")


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

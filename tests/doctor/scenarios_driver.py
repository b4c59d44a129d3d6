"""Machines whose cards or driver are as no one wants them."""

from __future__ import annotations

from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.smi_output import cards, render
from tests.doctor.tree import A, Tree, good, row_91, torch_npu

LATEST = f"/{A}/ascend-toolkit/latest"

BASE = Options(profiles=("base",))


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


@scenario("an accelerator of a kind to come", {"DRV011": "info"}, says="not known")
def unknown_chip(t: Tree) -> None:
    for device in (t.root / "sys/bus/pci/devices").iterdir():
        (device / "device").write_text("0xd900\n")
        (device / "class").write_text("0x120000\n")
    t.command("npu-smi info", render("25.0.rc1.1", cards(name="Ascend1000")))


def dmi(driver: str = "OK", firmware: str = "OK", toolkit: str = "OK") -> str:
    """`ascend-dmi -c`, as far as the manual describes it."""
    rows = [
        ("toolkit", "9.5.0", toolkit, "V100R001C11", "driver"),
        ("toolbox", "6.0.RC1", "OK", "NA", "NA"),
        ("npu-driver", "25.0.rc1.1", driver, "V100R001C21", "firmware"),
        ("npu-firmware", "7.7.0.1.231", firmware, "NA", "NA"),
    ]
    lines = [
        "System Information",
        "Architecture  aarch64",
        "Type  NPU",
        "Compatibility Check Result",
        "| Package | Version | Status | Innerversion | Dependencies |",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


@scenario("ascend-dmi finds all in order")
def good_dmi(t: Tree) -> None:
    t.command("ascend-dmi -c", dmi())


@scenario("ascend-dmi says something unknown")
def unknown_dmi(t: Tree) -> None:
    t.command("ascend-dmi -c", "Failed to load the libdcmi.so dynamic library. Check the "
              "environment configuration dependency.\n", 1)  # fmt: skip


@scenario("ascend-dmi finds the firmware wrong", {"DRV006": "fail"}, says="npu-firmware")
def firmware_by_dmi(t: Tree) -> None:
    t.command("ascend-dmi -c", dmi(firmware="INCOMPATIBLE PACKAGE"))


@scenario(
    "ascend-dmi finds a CANN to come wrong",
    {"DRV008": "warn", "PY006": "info"},
    base=lambda t: good(t, "9.5.0", "27.0.0"),
    options=BASE,
    says="ascend-dmi",
)
def toolkit_by_dmi(t: Tree) -> None:
    t.dist("torch", "2.14.0")
    torch_npu(t, "2.14.0", "2.14.0")
    tool = "usr/local/Ascend/toolbox/latest/Ascend-DMI/bin/ascend-dmi"
    t.file(tool)
    t.command(f"/{tool} -c", dmi(toolkit="INCOMPATIBLE PACKAGE"))


@scenario("npu-smi outside of PATH")
def tool_outside(t: Tree) -> None:
    t.commands["/usr/local/sbin/npu-smi info"] = t.commands.pop("npu-smi info")
    t.file("usr/local/sbin/npu-smi")
    t.file("usr/local/dcmi/libdcmi.so")


@scenario("npu-smi without its library", {"DRV007": "info"}, says="libdcmi.so")
def no_dcmi(t: Tree) -> None:
    t.file("usr/local/bin/npu-smi")

"""DRV: device nodes, driver and firmware."""

from __future__ import annotations

import os
import re

from sllmctl.doctor.cann_files import key_values
from sllmctl.doctor.check import (
    Finding,
    Status,
    check,
    cmd,
    fail,
    file,
    info,
    ok,
    say,
    skip,
    warn,
)
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.tables import driver_verdict
from sllmctl.doctor.versions import cann_key, dotted_in, starts_with

SHARED_NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")
# What a container needs of the driver beside its nodes and libraries.
DRIVER_FILES = (
    "/usr/local/dcmi",
    "/usr/local/bin/npu-smi",
    "/usr/local/Ascend/driver/version.info",
    "/etc/ascend_install.info",
)
_WRONG = "incompatible"
_COMPATIBLE = re.compile(r"V100R001C(\d+)")
_INTERVAL = re.compile(r"\[([^,\]]*),([^\]]*)\]")


@check(
    "DRV001",
    title="an Ascend card is on the PCI bus",
    why="without a card there is nothing to load to",
    looks_at="vendor and device ids below /sys/bus/pci/devices (vendor 0x19e5 alone is not "
    "enough: network cards have it too), and /dev/davinci*",
)
def card_there(m: Machine) -> Finding:
    if m.pci:
        kinds = ", ".join(sorted({kind for _, kind in m.pci}))
        seen = file("/sys/bus/pci/devices", f"{len(m.pci)} x {kinds}")
        return ok(say("{count} Ascend cards on the PCI bus", count=len(m.pci)), seen)
    if m.cards:
        return ok(say("{count} Ascend device nodes", count=len(m.cards)))
    if not m.probe.is_dir("/sys/bus/pci/devices"):
        return skip(say("the PCI bus cannot be seen from here"))
    return fail(
        say("there is no Ascend card in this machine"),
        file("/sys/bus/pci/devices", "no accelerator of vendor 0x19e5"),
        advice=say(
            "run this on the machine with the cards; to prepare checkpoints here, use "
            "`sllmctl doctor --profile convert`"
        ),
    )


@check(
    "DRV002",
    title="device nodes are there",
    why="the runtime opens /dev/davinciN, davinci_manager, devmm_svm and hisi_hdc",
    looks_at="/dev: each must be a character device; Docker makes a folder where the source of "
    "a mount is missing",
    needs=("DRV001",),
)
def nodes_there(m: Machine) -> Finding:
    missing, wrong = [], []
    for name in SHARED_NODES:
        node = m.probe.stat(f"/dev/{name}")
        if node is None:
            missing.append(f"/dev/{name}")
        elif node.kind != "char":
            wrong.append(f"/dev/{name}")
    if not m.cards:
        missing.append("/dev/davinci*")
    if wrong:
        return fail(
            say("{names} is not a device", names=", ".join(wrong)),
            *(file(name, "not a character device") for name in wrong),
            advice=say("remove it on the host, reload the driver, and start the container again"),
        )
    if not missing:
        names = f"davinci{','.join(map(str, m.cards))}"
        return ok(
            say("{count} cards have their device nodes", count=len(m.cards)), file("/dev", names)
        )
    seen = tuple(file(name, "missing") for name in missing)
    names = ", ".join(missing)
    if m.in_container:
        return fail(
            say("this container lacks {names}", names=names),
            *seen,
            fix=docker_run([path for paths in not_given(m) for path in paths]),
        )
    return fail(
        say("the driver is not loaded: {names} is missing", names=names),
        *seen,
        fix="npu-smi info  # then install the driver again, and reboot",
    )


def not_given(m: Machine) -> tuple[list[str], list[str]]:
    """What `docker run` kept back: what is needed of the driver, and what is good to have."""
    needed = [f"/dev/{n}" for n in SHARED_NODES if not m.probe.exists(f"/dev/{n}")]
    if not m.cards:
        needed.insert(0, "/dev/davinci0")
    if not (m.find_library("libascend_hal.so") or m.probe.is_dir(f"{m.driver_path}/lib64")):
        needed.append("/usr/local/Ascend/driver/lib64")
    return needed, [path for path in DRIVER_FILES if not m.probe.exists(path)]


def docker_run(paths: list[str]) -> str:
    """The command that gives a container devices and files of its host."""
    options = [f"--device {p}" if p.startswith("/dev/") else f"-v {p}:{p}" for p in paths]
    return f"docker run {' '.join(options)} ..."


@check(
    "DRV003",
    title="this user may open the device nodes",
    why="nodes belong to the group HwHiAiUser with mode 0660 unless installed for all",
    looks_at="read and write access to each node, its mode and group, the groups of the process "
    "and its capability DAC_OVERRIDE",
    needs=("DRV002",),
)
def nodes_open(m: Machine) -> Finding:
    names = [*SHARED_NODES, *(f"davinci{n}" for n in m.cards)]
    closed = [n for n in names if not m.probe.may(f"/dev/{n}", os.R_OK | os.W_OK)]
    if not closed:
        return ok(say("all device nodes can be opened"))
    if len(set(closed) & set(SHARED_NODES)) == 0 and len(closed) < len(m.cards):
        return info(
            say(
                "{count} of {total} cards are not for this user",
                count=len(closed),
                total=len(m.cards),
            ),
            *(file(f"/dev/{n}", "no access") for n in closed),
        )
    node = m.probe.stat(f"/dev/{closed[0]}")
    gid = node.gid if node else 0
    seen = file(
        f"/dev/{closed[0]}",
        f"mode {node.mode if node else 0:04o}, group {gid}; process: user {m.probe.host.euid}, "
        f"groups {','.join(map(str, sorted(m.probe.host.groups)))}",
    )
    if m.in_container:
        fix = f"docker run --group-add {gid} ..."
        if m.probe.host.euid == 0:
            fix = "docker run --cap-add DAC_OVERRIDE ..."
    else:
        fix = "sudo usermod -aG HwHiAiUser $USER  # then log in again"
    return fail(say("this user may not open /dev/{name}", name=closed[0]), seen, fix=fix)


@check(
    "DRV004",
    title="the driver's version can be read",
    why="CANN, the firmware and bug reports all go by it",
    looks_at="version.info of the driver, below the path in /etc/ascend_install.info",
    severity=Status.WARN,
    needs=("DRV001",),
)
def driver_version(m: Machine) -> Finding:
    path = f"{m.driver_path}/version.info"
    if m.driver:
        return ok(say("driver {version}", version=m.driver), file(path, m.driver))
    if m.shut_out and path.startswith(f"{m.shut_out}/"):
        return warn(
            say("this user may not look into {path}", path=m.shut_out),
            file(m.shut_out, "no access"),
            fix=f"sudo chmod a+rX {m.shut_out}",
        )
    if m.probe.exists(path):
        return info(say("{path} names no version", path=path), file(path, "no Version="))
    if m.in_container:
        return warn(
            say("the driver's version.info is not in this container"),
            file(path, "missing"),
            fix=f"docker run -v {path}:{path} ...",
        )
    return warn(
        say("there is no driver in {path}", path=m.driver_path),
        file(path, "missing"),
        advice=say("install the driver of these cards (Ascend-hdk-*-npu-driver_*.run --full)"),
    )


@check(
    "DRV005",
    title="the installation of the driver was finished",
    why="a driver installed halfway works at first and fails under load",
    looks_at="Driver_Install_Status=complete in /etc/ascend_install.info",
    severity=Status.WARN,
    needs=("DRV004",),
)
def driver_complete(m: Machine) -> Finding:
    path = "/etc/ascend_install.info"
    text = m.probe.read_text(path)
    if text is None:
        return info(say("{path} is not here", path=path), file(path, "missing"))
    values = key_values(text)
    status = values.get("Driver_Install_Status")
    # Older drivers write no status at all; npu-smi's own warning decides for them.
    if status == "complete" or (status is None and not m.smi.incomplete_driver):
        return ok(say("the driver is installed completely"), file(path, status or ""))
    return warn(
        say("the driver was not installed completely"),
        file(path, f"Driver_Install_Status={status}"),
        advice=say("run the driver's installer again with --full, then reboot"),
    )


@check(
    "DRV006",
    title="driver and firmware go together",
    why="each names the versions of the other that it accepts",
    looks_at="Compatibility in `npu-smi info -t board`, and `ascend-dmi -c` where the toolbox is "
    "installed; compatible_version_fw of the driver against Version of the firmware, and "
    "compatible_version_drv the other way round",
    needs=("DRV004",),
)
def firmware(m: Machine) -> Finding:
    path = f"{os.path.dirname(m.driver_path)}/firmware/version.info"  # noqa: PTH120
    values = key_values(m.probe.read_text(path))
    version = values.get("Version", "")
    said = _board(m)
    if said and said[1].upper() not in ("OK", "NA"):
        return fail(
            say("npu-smi says that driver and firmware do not go together"),
            cmd(said[0], f"Compatibility: {said[1]}"),
            advice=say("install driver and firmware of the same release, then reboot"),
        )
    wrong = [n for n in ("npu-driver", "npu-firmware") if m.dmi.get(n, ("", ""))[1] == _WRONG]
    if wrong:
        return fail(
            say("ascend-dmi says that {name} does not fit", name=wrong[0]),
            cmd("ascend-dmi -c", f"{wrong[0]} {m.dmi[wrong[0]][0]}: incompatible"),
            advice=say("install driver and firmware of the same release, then reboot"),
        )
    if said and not version:
        return ok(say("npu-smi says that driver and firmware go together"), cmd(*said))
    if not version or not m.driver:
        return skip(say("the firmware's version is on the host only"))
    intervals = _INTERVAL.findall(m.driver_info.get("compatible_version_fw", ""))
    back = _INTERVAL.findall(values.get("compatible_version_drv", ""))
    seen = (file(path, version), file(f"{m.driver_path}/version.info", m.driver))
    if intervals and not any(dotted_in(version, low, high) for low, high in intervals):
        wanted = ", ".join(f"{low} - {high}" for low, high in intervals)
        return fail(
            say(
                "firmware {firmware} is not one that driver {driver} accepts ({wanted})",
                firmware=version, driver=m.driver, wanted=wanted,
            ),
            *seen,
            advice=say("install driver and firmware of the same release, then reboot"),
        )  # fmt: skip
    if back and not any(
        dotted_in(m.driver, low, high) or starts_with(m.driver, low) for low, high in back
    ):
        return info(
            say(
                "firmware {firmware} does not list driver {driver}",
                firmware=version, driver=m.driver,
            ),
            *seen,
        )  # fmt: skip
    return ok(say("firmware {version} suits the driver", version=version), *seen)


def _board(m: Machine) -> tuple[str, str] | None:
    """What npu-smi says about the compatibility of the first card: (command, word), or None."""
    if not m.smi.cards:
        return None
    argv = ["npu-smi", "info", "-t", "board", "-i", str(m.smi.cards[0].npu)]
    match = re.search(r"^\s*Compatibility\s*:\s*(\S+)", m.probe.run(argv).out, re.MULTILINE)
    return (" ".join(argv), match[1]) if match else None


@check(
    "DRV007",
    title="the driver's libraries can be loaded",
    why="torch_npu and CANN load libascend_hal.so from the driver",
    looks_at="libascend_hal.so below the driver, its machine, and whether LD_LIBRARY_PATH or the "
    "loader's cache leads to it; libdcmi.so beside npu-smi",
    needs=("DRV004",),
)
def driver_libraries(m: Machine) -> Finding:
    name = "libascend_hal.so"
    if m.shut_out and m.driver_path.startswith(f"{m.shut_out}/"):
        return skip(say("this user may not look into {path}", path=m.shut_out))
    places = [f"{m.driver_path}/lib64/{sub}{name}" for sub in ("driver/", "", "common/")]
    path = next((p for p in places if m.probe.exists(p)), None)
    if path is None:
        lib64 = f"{m.driver_path}/lib64"
        found = m.find_library(name)
        if found and not re.search(r"/(stub|devlib)/", found):
            return ok(say("{name} is in {path}", name=name, path=found), file(found))
        return fail(
            say("{name} is not in {path}", name=name, path=lib64),
            file(places[0], "missing"),
            fix=f"docker run -v {lib64}:{lib64} ..." if m.in_container else "",
            advice=None if m.in_container else say("install the driver again"),
        )
    elf = m.probe.elf(path)
    if elf and elf.machine != m.arch:
        return fail(
            say("{path} is for {machine}, this machine is {arch}",
                path=path, machine=elf.machine, arch=m.arch),
            file(path, elf.machine),
            advice=say("install the driver for this machine"),
        )  # fmt: skip
    if m.env.get("ASCEND_HOME_PATH") and m.find_library(name) is None:
        return fail(
            say("{name} is here, but nothing leads the loader to it", name=name),
            file(path, "not in LD_LIBRARY_PATH"),
            fix=f"source {m.set_env}",
        )
    tools = ("/usr/local/bin/npu-smi", "/usr/local/sbin/npu-smi")
    tool = next((p for p in tools if m.probe.exists(p)), None)
    dcmi = "/usr/local/dcmi/libdcmi.so"
    if tool and not m.probe.exists(dcmi) and m.find_library("libdcmi.so") is None:
        return info(
            say("npu-smi is here without libdcmi.so, which it loads"), file(dcmi, "missing")
        )
    return ok(say("the driver's libraries are here"), file(path))


@check(
    "DRV008",
    title="driver and CANN go together",
    why="a driver that is too old for CANN fails in aclInit (507899) or in pinning memory",
    looks_at="the vendor's table of drivers for each CANN; where that does not know them, "
    "`ascend-dmi -c` and the compatible_version list of the driver",
    needs=("DRV004", "CANN001"),
)
def driver_for_cann(m: Machine) -> Finding:
    assert m.cann is not None
    cann = m.cann.version
    if not m.driver:
        return skip(say("the driver's version is not known"))
    seen = (file(f"{m.driver_path}/version.info", m.driver), file(m.cann.source, cann))
    row = m.tables.for_cann_driver(cann)
    if row is None:
        return _declared(m, cann)
    verdict = driver_verdict(row, m.driver)
    paired = " / ".join(row.paired)
    if verdict == "rejected":
        return fail(
            say("driver {driver} is too old for CANN {cann}", driver=m.driver, cann=cann),
            *seen,
            advice=say("upgrade the driver to {paired}, or use an older CANN", paired=paired),
        )
    if verdict == "old":
        return warn(
            say(
                "driver {driver} is older than any that CANN {cann} was tested with",
                driver=m.driver, cann=cann,
            ),
            *seen,
            advice=say("upgrade the driver to {paired}", paired=paired),
        )  # fmt: skip
    if verdict == "paired":
        return ok(say("driver {driver} is that of CANN {cann}", driver=m.driver, cann=cann), *seen)
    return info(
        say(
            "driver {driver} is not the one released with CANN {cann} ({paired}), which is fine",
            driver=m.driver, cann=cann, paired=paired,
        )
        if verdict in ("accepted", "newer")
        else say("the tables do not know driver {driver}", driver=m.driver),
        *seen,
    )  # fmt: skip


def _declared(m: Machine, cann: str) -> Finding:
    """The driver's own list of CANN generations; their numbers are in order up to 8.5 only."""
    unknown = info(
        say("the tables ({date}) do not know CANN {cann}", date=m.tables.date, cann=cann),
        file(m.cann.source if m.cann else "", cann),
    )
    version, verdict = m.dmi.get("toolkit", ("", ""))
    if verdict == _WRONG:
        return warn(
            say("ascend-dmi says that CANN {cann} does not fit this driver", cann=cann),
            cmd("ascend-dmi -c", f"toolkit {version}: incompatible"),
            advice=say("upgrade the driver"),
        )
    key = cann_key(cann)
    inner = _COMPATIBLE.match(m.cann.inner) if m.cann else None
    accepted = [int(n) for n in _COMPATIBLE.findall(m.driver_info.get("compatible_version", ""))]
    if key is None or key >= (9,) or inner is None or not accepted:
        return unknown
    if int(inner[1]) > max(accepted):
        return warn(
            say("driver {driver} does not know CANN {cann} yet", driver=m.driver, cann=cann),
            file(f"{m.driver_path}/version.info", m.driver_info["compatible_version"]),
            advice=say("upgrade the driver"),
        )
    return unknown

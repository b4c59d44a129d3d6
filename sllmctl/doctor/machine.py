"""A machine as checks see it: each fact is found once, on first use."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from sllmctl.core.config import looks_like_path
from sllmctl.doctor.ascend_dmi import parse_ascend_dmi
from sllmctl.doctor.cann_files import (
    BASE,
    CannRoot,
    Nnal,
    find_nnal,
    find_roots,
    key_values,
    root_of,
    root_path,
)
from sllmctl.doctor.distributions import Distributions
from sllmctl.doctor.npu_smi import PCI_GENERATIONS, Smi, generation, parse_npu_smi
from sllmctl.doctor.probe import Probe, Ran
from sllmctl.doctor.store_answer import Answer
from sllmctl.doctor.tables import Tables, load_tables
from sllmctl.store.protocol import SOCKET_VARIABLE, SYSTEM_SOCKET

_CARD = re.compile(r"davinci(\d{1,4})$")


@dataclass(frozen=True, slots=True)
class Options:
    """What a person said about what the machine is for.

    Attributes:
        profiles: Names of `PROFILES`, or ("auto",) to choose by what is installed.
        commands: Whether commands may be run and loopback ports tried.
        network: Whether other machines may be asked.
        deep: Whether devices may be touched, in children.
        source: A source tree that is to be built.
        pool_bytes: Size of the memory pool that is to be, or None.
        pool_text: The same as it was written: sllm-store reads `4GB` as 4 GiB.
        model: A model that is to be served: a path or a hub name.
    """

    profiles: tuple[str, ...] = ("auto",)
    commands: bool = True
    network: bool = False
    deep: bool = False
    model: str = ""
    storage_path: str = ""
    pool_bytes: int | None = None
    pool_text: str = ""
    base_url: str = ""
    served_model: str = ""
    source: str = ""


@dataclass
class Machine:
    """One machine: a probe, what a person wants of it, and the facts found so far."""

    probe: Probe
    options: Options = field(default_factory=Options)
    tables: Tables = field(default_factory=load_tables)

    @cached_property
    def env(self) -> dict[str, str]:
        """The environment of the process."""
        return self.probe.env

    @cached_property
    def arch(self) -> str:
        """``uname -m``, with amd64 and arm64 as x86_64 and aarch64."""
        return {"amd64": "x86_64", "arm64": "aarch64"}.get(
            self.probe.host.machine, self.probe.host.machine
        )

    @cached_property
    def in_container(self) -> bool:
        """Whether this process runs in a container."""
        if self.probe.exists("/.dockerenv") or self.probe.exists("/run/.containerenv"):
            return True
        if "KUBERNETES_SERVICE_HOST" in self.env:
            return True
        groups = self.probe.read_text("/proc/1/cgroup") or ""
        return bool(re.search(r"docker|kubepods|containerd|lxc", groups))

    @cached_property
    def pci(self) -> list[tuple[str, str]]:
        """(address, generation) of each Ascend card on the PCI bus."""
        found = []
        for address in self.probe.listdir("/sys/bus/pci/devices"):
            device = f"/sys/bus/pci/devices/{address}"
            if (self.probe.read_text(f"{device}/vendor") or "").strip() != "0x19e5":
                continue
            kind = (self.probe.read_text(f"{device}/device") or "").strip().lower()
            # Class 0x1200 is a processing accelerator; the vendor's network cards are others.
            accelerator = (self.probe.read_text(f"{device}/class") or "").startswith("0x1200")
            if kind in PCI_GENERATIONS or accelerator:
                found.append((address, PCI_GENERATIONS.get(kind, "")))
        return found

    @cached_property
    def cards(self) -> list[int]:
        """Numbers of the `/dev/davinciN` nodes that are devices."""
        found = []
        for name in self.probe.listdir("/dev"):
            match = _CARD.match(name)
            node = self.probe.stat(f"/dev/{name}") if match else None
            if match and node is not None and node.kind == "char":
                found.append(int(match[1]))
        return sorted(found)

    @cached_property
    def driver_path(self) -> str:
        """Where the driver is installed."""
        info = key_values(self.probe.read_text("/etc/ascend_install.info"))
        return posixpath.join(info.get("Driver_Install_Path_Param") or BASE, "driver")

    @cached_property
    def driver_info(self) -> dict[str, str]:
        """What the driver's version.info says; empty without one."""
        return key_values(self.probe.read_text(f"{self.driver_path}/version.info"))

    @cached_property
    def driver(self) -> str:
        """Version of the driver, or ""."""
        return self.driver_info.get("Version", "")

    @cached_property
    def smi_ran(self) -> Ran | None:
        """`npu-smi info` as it ended; None where commands may not be run."""
        if not self.options.commands:
            return None
        ran = self.probe.run(["npu-smi", "info"])
        for place in ("/usr/local/sbin/npu-smi", "/usr/local/bin/npu-smi"):  # not in every PATH
            if ran.code == 127 and self.probe.exists(place):
                ran = self.probe.run([place, "info"])
        return ran

    @cached_property
    def smi(self) -> Smi:
        """What `npu-smi info` said."""
        ran = self.smi_ran
        return parse_npu_smi(f"{ran.out}\n{ran.err}") if ran else Smi()

    @cached_property
    def dmi(self) -> dict[str, tuple[str, str]]:
        """What `ascend-dmi -c` says of each package; empty without the toolbox."""
        if not self.options.commands:
            return {}
        place = f"{BASE}/toolbox/latest/Ascend-DMI/bin/ascend-dmi"
        ran = self.probe.run([place if self.probe.exists(place) else "ascend-dmi", "-c"])
        return parse_ascend_dmi(ran.out)

    @cached_property
    def shut_out(self) -> str:
        """The directory of Ascend that is there, and closed to this user; "" if none is."""
        for path in (BASE, f"{BASE}/ascend-toolkit"):
            if self.probe.is_dir(path) and not self.probe.may(path, os.R_OK | os.X_OK):
                return path
        return ""

    @cached_property
    def generation(self) -> str:
        """Generation of the chips (A1, A2, A3, 310P, 310B, A5), by name or PCI id, or ""."""
        names = Counter(generation(card.name) for card in self.smi.cards)
        names.pop("", None)
        kinds = names or Counter(kind for _, kind in self.pci if kind)
        return kinds.most_common(1)[0][0] if kinds else ""

    @cached_property
    def cann_roots(self) -> list[CannRoot]:
        """Every CANN on the machine, that of the environment first."""
        return find_roots(self.probe)

    @cached_property
    def cann(self) -> CannRoot | None:
        """The CANN that counts: of the environment, else `cann` or `latest`, else the first."""
        roots = {root.path: root for root in self.cann_roots}
        chosen = [self.env.get("ASCEND_HOME_PATH", ""), self.env.get("ASCEND_TOOLKIT_HOME", "")]
        homes = [BASE, posixpath.join(self.probe.host.home, "Ascend")]
        for home in homes:
            chosen += [f"{home}/cann", f"{home}/ascend-toolkit/latest"]
        for path in filter(None, chosen):
            if (root := roots.get(root_path(self.probe, path))) is not None:
                return root
        return next(iter(roots.values()), None)

    def cann_of(self, path: str) -> str | None:
        """Real root of the CANN that a path leads into, or None if it leads into none."""
        spelled = root_of(path)
        return root_path(self.probe, spelled) if spelled else None

    @cached_property
    def set_env(self) -> str:
        """The set_env.sh to source: one that is there, beside the CANN that counts."""
        if self.cann is None:
            return f"{BASE}/ascend-toolkit/set_env.sh"
        parent = posixpath.dirname(self.cann.path)
        for path in (f"{self.cann.path}/set_env.sh", f"{parent}/set_env.sh"):
            if self.probe.exists(path):
                return path
        return f"{parent}/set_env.sh"

    @cached_property
    def nnal(self) -> list[Nnal]:
        """Every NNAL/ATB on the machine, the one in use first."""
        return find_nnal(self.probe, self.cann_roots)

    @cached_property
    def dists(self) -> Distributions:
        """The Python distributions that this interpreter finds."""
        return Distributions(self.probe)

    @cached_property
    def library_path(self) -> list[str]:
        """Entries of LD_LIBRARY_PATH, empty ones included."""
        value = self.env.get("LD_LIBRARY_PATH", "")
        return value.split(":") if value else []

    def find_library(self, name: str) -> str | None:
        """Where the loader would find a library: LD_LIBRARY_PATH, then the system's cache."""
        for entry in self.library_path:
            if entry and self.probe.exists(f"{entry}/{name}"):
                return f"{entry.rstrip('/')}/{name}"
        cache = self.probe.read_bytes("/etc/ld.so.cache", 4 << 20) or b""
        match = re.search(rb"[\0](/[^\0]*/" + re.escape(name).encode() + rb")\0", cache)
        if match:
            return match[1].decode("utf-8", "replace")
        arch = f"/usr/lib/{self.arch}-linux-gnu"
        for place in ("/lib64", "/usr/lib64", arch, "/lib", "/usr/lib"):
            if self.probe.exists(f"{place}/{name}"):
                return f"{place}/{name}"
        return None

    @cached_property
    def torch_abi(self) -> int | None:
        """1 or 0, the C++ ABI that torch was built with; None if its files do not say."""
        package = self.dists.package("torch", "torch")
        config = f"{package}/share/cmake/Torch/TorchConfig.cmake"
        text = self.probe.read_text(config) if package else None
        match = re.search(r"_GLIBCXX_USE_CXX11_ABI=([01])", text or "")
        return int(match[1]) if match else None

    @cached_property
    def storage_path(self) -> str:
        """Where checkpoints are to live, there or not."""
        given = (
            self.options.storage_path
            or self.env.get("SLLMCTL_STORAGE_PATH")
            or self.env.get("STORAGE_PATH")
            or "models"
        )
        return posixpath.join(self.probe.host.cwd, given)

    @cached_property
    def model_path(self) -> str:
        """The directory that ``options.model`` means to `load`; "" where there is none."""
        model, cwd = self.options.model, self.probe.host.cwd
        if model == "~" or model.startswith("~/"):
            model = self.probe.host.home + model[1:]
        places = [posixpath.join(cwd, model)] if model else []
        if model and not looks_like_path(model):
            places.insert(0, posixpath.join(self.storage_path, model))
        return next((posixpath.normpath(p) for p in places if self.probe.is_dir(p)), "")

    @cached_property
    def model_bytes(self) -> int:
        """Bytes of the shards of ``options.model``, where that is a directory; else 0."""
        path = self.model_path
        if not path:
            return 0
        names = [n for n in self.probe.listdir(path) if n.endswith((".safetensors", ".bin"))]
        nodes = [self.probe.stat(f"{path}/{name}") for name in names]
        return sum(node.size for node in nodes if node)

    @cached_property
    def store(self) -> tuple[str, Answer | None]:
        """The first socket of a store that is there, and what answers; ("", None) without one.

        Source: docs/reference/store-protocol.md, where a client looks.
        """
        runtime = self.env.get("XDG_RUNTIME_DIR")
        usual = [f"{runtime}/sllmctl/store.sock"] if runtime else []
        usual.append(str(SYSTEM_SOCKET))
        said = self.env.get(SOCKET_VARIABLE)
        for path in [posixpath.join(self.probe.host.cwd, said)] if said else usual:
            if self.probe.lexists(path):
                return path, self.probe.ask_store(path)
        return "", None

    def nearest(self, path: str) -> str | None:
        """A directory, or the nearest one above it that is there."""
        path = posixpath.normpath(posixpath.join(self.probe.host.cwd, path))
        while not self.probe.is_dir(path):
            if path == "/":
                return None
            path = posixpath.dirname(path)
        return path

    @cached_property
    def swap_bytes(self) -> int:
        """Swap space of the machine, used or not."""
        text = self.probe.read_text("/proc/meminfo") or ""
        match = re.search(r"^SwapTotal:\s*(\d{1,18}) kB", text, re.MULTILINE)
        return int(match[1]) << 10 if match else 0

    @cached_property
    def has_ascend(self) -> bool:
        """Whether anything of Ascend is here: a card, CANN, torch_npu or vllm-ascend."""
        return bool(
            self.pci
            or self.cards
            or self.cann_roots
            or self.dists.get("torch-npu")
            or self.dists.get("vllm-ascend")
        )

    @cached_property
    def profiles(self) -> tuple[str, ...]:
        """The profiles that are looked at; ``auto`` goes by what is here."""
        if self.options.profiles != ("auto",):
            return self.options.profiles
        if not self.has_ascend:
            return ("convert",)
        engines = {
            "store": ("serverless-llm-store",),
            "vllm": ("vllm-ascend",),
            "sglang": ("sglang", "sgl-kernel-npu"),
        }
        installed = [p for p, names in engines.items() if any(map(self.dists.get, names))]
        return ("base", *installed)

"""Where CANN and NNAL lie on a machine, and which versions they say they are."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass

from sllmctl.doctor.probe import Probe
from sllmctl.doctor.versions import cann_key

BASE = "/usr/local/Ascend"
VALUE_CHARS = 1000  # more than any version has: what is longer is damage
_ROOT = re.compile(r"^(.*/(?:ascend-toolkit|nnae|nnrt)/[^/]+|.*/cann(?:-[^/]+)?)(?=/|$)")
# Components of CANN before 9 have numbers of their own in Version: 7.6.0.1.220, 8.2.0.0.201.
_PLAIN = re.compile(r"^(9|\d\d)\.\d+\.(RC)?\d+$")
_PAIR = re.compile(r"\[?[^:\[\],]*:([^\],]+)\]?")


@dataclass(frozen=True, slots=True)
class CannRoot:
    """One installed CANN: where, which version by which file, for which machine."""

    path: str
    version: str
    source: str
    arch: str = ""
    inner: str = ""

    @property
    def runtime_only(self) -> bool:
        """Whether this is nnae or nnrt, which hold no compiler."""
        return "/nnae/" in self.path or "/nnrt/" in self.path


def key_values(text: str | None) -> dict[str, str]:
    """Lines of KEY=VALUE, as the vendor's info files have them."""
    found: dict[str, str] = {}
    for line in (text or "").splitlines():
        key, mark, value = line.partition("=")
        if mark and key.strip() and not key.lstrip().startswith("#"):
            found.setdefault(key.strip(), value.strip(' \t"\0')[:VALUE_CHARS])
    return found


def root_of(path: str) -> str | None:
    """The CANN root that a path belongs to, as the path spells it, or None."""
    match = _ROOT.match(posixpath.normpath(path)) if path.startswith("/") else None
    return match[1] if match else None


def find_roots(probe: Probe) -> list[CannRoot]:
    """Every CANN on the machine, each once, those of the environment first."""
    env = probe.env
    candidates = [
        env.get("ASCEND_HOME_PATH", ""),
        env.get("ASCEND_TOOLKIT_HOME", ""),
        posixpath.dirname(env.get("ASCEND_OPP_PATH", "").rstrip("/")),
    ]
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        candidates += [root_of(entry) or "" for entry in env.get(name, "").split(":")]
    bases = [BASE, posixpath.join(probe.host.home, "Ascend")]
    if prefix := env.get("CONDA_PREFIX"):
        bases.append(f"{prefix}/Ascend")
    for info in ("/etc/Ascend/ascend_cann_install.info", f"{bases[1]}/ascend_cann_install.info"):
        bases.append(key_values(probe.read_text(info)).get("Install_Path", ""))
    for base in filter(None, bases):
        candidates += [f"{base}/cann", f"{base}/ascend-toolkit/latest"]
        for kind in ("cann-*", "ascend-toolkit/*[0-9]*", "nnae/*[0-9]*", "nnrt/*[0-9]*"):
            candidates += sorted(probe.glob(f"{base}/{kind}"), key=_newness, reverse=True)
    roots: dict[str, CannRoot] = {}
    for candidate in candidates:
        if not candidate.startswith("/") or not probe.is_dir(candidate):
            continue
        path = root_path(probe, candidate)
        if path not in roots and (root := read_root(probe, path)):
            roots[path] = root
    return list(roots.values())


def _newness(path: str) -> tuple[int, ...]:
    return cann_key(posixpath.basename(path).removeprefix("cann-")) or ()


def root_path(probe: Probe, path: str) -> str:
    """The real directory of a root. `latest` of CANN up to 8.3 may be a directory of links."""
    real = probe.realpath(path)
    if posixpath.basename(real) == "latest":
        for part in ("lib64", "opp", "runtime", "compiler"):
            if probe.readlink(f"{real}/{part}") is not None:
                inner = root_of(probe.realpath(f"{real}/{part}"))
                if inner and inner != real and probe.is_dir(inner):
                    return inner
    return real


def read_root(probe: Probe, path: str) -> CannRoot | None:
    """What a directory says about the CANN in it; None if there is none."""
    said = versions_of(probe, path)
    if not said:
        return None
    source, version = said[0]
    for info in probe.glob(f"{path}/*-linux/ascend_*_install.info"):
        values = key_values(probe.read_text(info))
        if values.get("version") and "_ops_" not in info:
            return CannRoot(
                path, version, source, values.get("arch", ""), values.get("innerversion", "")
            )
    return CannRoot(path, version, source)


def versions_of(probe: Probe, path: str) -> list[tuple[str, str]]:
    """(source, version) for every place in a root that names one, the most reliable first."""
    said = []
    for info in probe.glob(f"{path}/*-linux/ascend_*_install.info"):
        # Operators are a package of their own, which may be of another version.
        if "_ops_" not in info and (version := key_values(probe.read_text(info)).get("version")):
            said.append((info, version))
    config = key_values(probe.read_text(f"{path}/version.cfg"))
    if pairs := _PAIR.findall(config.get("toolkit_running_version", "")):
        said.append((f"{path}/version.cfg", pairs[-1].strip()))
    for part in ("toolkit", "runtime", "compiler", "opp"):
        name = f"{path}/{part}/version.info"
        values = key_values(probe.read_text(name))
        if version := values.get("version_dir"):
            said.append((name, version))
        elif _PLAIN.match(values.get("Version", "")):
            said.append((name, values["Version"]))
    name = posixpath.basename(path).removeprefix("cann-")
    # One that is closed to this user is named by its folder alone.
    there = (
        probe.is_dir(f"{path}/opp")
        or probe.is_dir(f"{path}/lib64")
        or not probe.may(path, os.R_OK | os.X_OK)
    )
    if not said and cann_key(name) and there:
        said.append((path, name))
    return said


def kernels_version(probe: Probe, root: CannRoot) -> tuple[str, str] | None:
    """(source, version) of the operator package of a root, or None if no file names it."""
    for info in probe.glob(f"{root.path}/*-linux/ascend_ops_install.info"):
        if version := key_values(probe.read_text(info)).get("version"):
            return info, version
    config = key_values(probe.read_text(f"{root.path}/version.cfg"))
    if pairs := _PAIR.findall(config.get("opp_kernel_running_version", "")):
        return f"{root.path}/version.cfg", pairs[-1].strip()
    return None


@dataclass(frozen=True, slots=True)
class Nnal:
    """One installed NNAL/ATB: its directory, version, and the C++ ABIs that it has."""

    path: str
    version: str
    abis: tuple[int, ...]


def find_nnal(probe: Probe, roots: list[CannRoot]) -> list[Nnal]:
    """Every NNAL/ATB on the machine: that of the environment first, then that of `latest`."""
    bases = {BASE: None, posixpath.join(probe.host.home, "Ascend"): None}
    for root in roots:
        parent = posixpath.dirname(root.path)
        bases[posixpath.dirname(parent) if parent.endswith("-toolkit") else parent] = None
    candidates = []
    home = probe.env.get("ATB_HOME_PATH", "")
    if "/atb/cxx_abi_" in home:
        candidates.append(home[: home.index("/atb/cxx_abi_")])
    for base in bases:
        candidates += [f"{base}/nnal/atb/latest", *probe.glob(f"{base}/nnal/atb/*[0-9]*")]
    found: dict[str, Nnal] = {}
    for candidate in candidates:
        path = probe.realpath(candidate)
        libraries = probe.glob(f"{path}/atb/cxx_abi_[01]/lib/libatb.so")
        if path in found or not libraries:
            continue
        abis = tuple(int(name.split("cxx_abi_")[1][0]) for name in libraries)
        found[path] = Nnal(path, _nnal_version(probe, path), abis)
    return list(found.values())


def _nnal_version(probe: Probe, path: str) -> str:
    text = probe.read_text(f"{path}/version.info") or ""
    match = re.search(r"Ascend-cann-atb(?: Version)?\s*:\s*(\S+)", text)
    version = match[1] if match else posixpath.basename(path)
    return re.sub(r"\.B\d+$", "", version)

"""Installed Python distributions, from their metadata alone: nothing is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sllmctl.doctor.probe import Probe, parse_json

_REQUIRES = re.compile(r"^Requires-Dist:\s*([A-Za-z0-9._-]+)\s*\(?([^;)\n]*)", re.MULTILINE)
_TAG = re.compile(r"^Tag:\s*(\S+)", re.MULTILINE)
_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_")
_LEGACY = {"manylinux2014": (2, 17), "manylinux2010": (2, 12), "manylinux1": (2, 5)}


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it: ``torch_npu`` is ``torch-npu``."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True, slots=True)
class Distribution:
    """One installed distribution: where its metadata and its packages lie."""

    name: str
    version: str
    info: str
    site: str


@dataclass(slots=True)
class Distributions:
    """Everything that the interpreter of a machine finds on its path; the first wins."""

    probe: Probe
    _found: dict[str, Distribution] = field(default_factory=dict)
    _listed: bool = False

    def get(self, name: str) -> Distribution | None:
        """An installed distribution, by any spelling of its name."""
        return self.all().get(canonical(name))

    def version(self, name: str) -> str:
        """Its version, or ""."""
        found = self.get(name)
        return found.version if found else ""

    def all(self) -> dict[str, Distribution]:
        """Every distribution by canonical name."""
        if not self._listed:
            self._listed = True
            for site in dict.fromkeys(self.probe.host.sys_path):
                for entry in self.probe.listdir(site):
                    self._add(site, entry)
        return self._found

    def _add(self, site: str, entry: str) -> None:
        stem, dot, kind = entry.rpartition(".")
        if not dot or kind not in ("dist-info", "egg-info"):
            return
        name, _, version = stem.rpartition("-")
        if kind == "egg-info" or not name:
            name, version = self._read_name(f"{site}/{entry}", stem.partition("-")[0])
        if name:
            self._found.setdefault(
                canonical(name), Distribution(name, version, f"{site}/{entry}", site)
            )

    def _read_name(self, info: str, name: str) -> tuple[str, str]:
        text = self.probe.read_text(f"{info}/PKG-INFO") or self.probe.read_text(f"{info}/METADATA")
        fields = dict(re.findall(r"^(Name|Version):\s*(\S+)", text or "", re.MULTILINE))
        return fields.get("Name", name), fields.get("Version", "")

    def requires(self, name: str) -> dict[str, str]:
        """What a distribution requires: canonical name to specifier (the first of each)."""
        found = self.get(name)
        text = self.probe.read_text(f"{found.info}/METADATA", 1 << 20) if found else None
        needed: dict[str, str] = {}
        for other, specifier in _REQUIRES.findall((text or "").split("\n\n")[0]):
            needed.setdefault(canonical(other), specifier.strip())
        return needed

    def pinned(self, name: str, other: str) -> str:
        """The one version of ``other`` that a distribution requires (``==``), or ""."""
        match = re.match(r"==\s*([^,\s*]+)$", self.requires(name).get(canonical(other), ""))
        return match[1] if match else ""

    def glibc(self, name: str) -> tuple[int, int] | None:
        """The C library that a wheel was made for, by its tag, or None if it names none."""
        found = self.get(name)
        text = self.probe.read_text(f"{found.info}/WHEEL") if found else None
        wanted = []
        for tag in _TAG.findall(text or ""):
            platform = tag.rpartition("-")[2]
            wanted += [(int(a), int(b)) for a, b in _MANYLINUX.findall(platform)]
            wanted += [v for old, v in _LEGACY.items() if platform.startswith(old)]
        return min(wanted) if wanted else None

    def entry_points(self, name: str, group: str) -> dict[str, str]:
        """Entry points of a distribution in one group: name to object."""
        found = self.get(name)
        text = self.probe.read_text(f"{found.info}/entry_points.txt") if found else None
        points, section = {}, ""
        for line in (text or "").splitlines():
            if line.strip().startswith("["):
                section = line.strip(" []")
            elif section == group and "=" in line:
                key, _, value = line.partition("=")
                points[key.strip()] = value.strip()
        return points

    def package(self, name: str, module: str) -> str | None:
        """Directory of a distribution's package, also of an editable install, or None."""
        found = self.get(name)
        if found is None:
            return None
        for base in (found.site, *self.editable(name)):
            if self.probe.is_dir(f"{base}/{module}"):
                return f"{base}/{module}"
        return None

    def editable(self, name: str) -> list[str]:
        """Directories of source that an editable install points to; none for any other."""
        found = self.get(name)
        if found is None:
            return []
        url = parse_json(self.probe.read_text(f"{found.info}/direct_url.json") or "")
        info = url.get("dir_info") if isinstance(url, dict) else None
        if not isinstance(info, dict) or not info.get("editable"):
            return []
        path = str(url.get("url", "")).removeprefix("file://")
        return [path, f"{path}/src", f"{path}/python"]

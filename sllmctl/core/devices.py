"""Devices by name: ``npu:0``, ``cuda:1``, ``cpu``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sllmctl.errors import ConfigError, DeviceUnavailable

KINDS = ("cpu", "npu", "cuda")


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A kind and an ordinal; the host is ``cpu:0``, written ``cpu``."""

    kind: str
    ordinal: int = 0

    @classmethod
    def parse(cls, text: str) -> DeviceSpec:
        """Read ``npu:0``, ``cuda`` or ``cpu``.

        Raises:
            ConfigError: The text names no device.
        """
        match = re.fullmatch(r"([a-z]+)(?::(\d{1,4}))?", text.strip())
        if match is None or match[1] not in KINDS or (match[1] == "cpu" and int(match[2] or 0)):
            raise ConfigError(
                f"`{text}` is not a device", hint="write it like npu:0, cuda:1 or cpu"
            )
        return cls(match[1], int(match[2] or 0))

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.ordinal}"


def require_cpu(device: object) -> DeviceSpec:
    """Parse a device, and refuse what this version cannot load to.

    Raises:
        ConfigError: The text names no device.
        DeviceUnavailable: It is an accelerator.
    """
    spec = DeviceSpec.parse(str(device))
    if spec.kind != "cpu":
        raise DeviceUnavailable(
            f"cannot load to {spec}: this version of sllmctl loads into host memory alone",
            hint='load with --device cpu, and move the model with torch\'s `.to("npu")`',
        )
    return spec

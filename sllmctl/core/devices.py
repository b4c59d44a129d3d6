"""Devices by name (``npu:0``, ``cuda:1``, ``cpu``), and what torch can say about them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from sllmctl.core.host import available_memory_bytes
from sllmctl.core.units import format_size
from sllmctl.errors import ConfigError, DeviceError, DeviceUnavailable, HostMemoryError

KINDS = ("npu", "cuda", "cpu")
"""In the order in which ``auto`` prefers them."""

_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
_DOCTOR = "`sllmctl doctor` says what is missing, and how to get it"
log = logging.getLogger(__name__)


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
        kind, colon, number = text.strip().partition(":")
        counts = number.isdecimal() and number.isascii() and len(number) <= 4
        ordinal = int(number) if counts else 0
        if kind not in KINDS or (colon and not counts) or (kind == "cpu" and ordinal):
            raise ConfigError(
                f"`{text}` is not a device", hint="write it like npu:0, cuda:1 or cpu"
            )
        return cls(kind, ordinal)

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.ordinal}"


def find_device(device: object) -> DeviceSpec:
    """The device that somebody means, once it is known to be there.

    Args:
        device: A name, a `DeviceSpec` or a ``torch.device``. Without an ordinal it is torch's
            current one of that kind; an ``int`` counts accelerators; ``auto`` is the current
            device of the first kind that works here, in the order of `KINDS`.

    Raises:
        ConfigError: It names no device.
        DeviceUnavailable: The device, its driver, or what torch needs for it is missing.
    """
    text = str(device).strip()
    if text == "auto":
        text = accelerator_kind() or "cpu"
    elif isinstance(device, int):
        text = f"{accelerator_kind() or 'cuda'}:{device}"
    spec = DeviceSpec.parse(text)
    if spec.kind != "cpu":
        runtime = torch_runtime(spec)
        if ":" not in text:
            spec = DeviceSpec(spec.kind, runtime.current_device())
    return spec


def accelerator_kind() -> str | None:
    """The first kind of accelerator that works here; None on a machine without any."""
    for kind in KINDS[:-1]:
        # Importing torch_npu takes a second, which a machine without it should not pay.
        if kind == "npu" and importlib.util.find_spec("torch_npu") is None:
            continue
        try:
            torch_runtime(DeviceSpec(kind))
        except DeviceUnavailable as exc:
            log.info("%s", exc)
            continue
        return kind
    return None


def accelerators() -> list[DeviceSpec]:
    """Every device of the kind that ``auto`` means; none on a machine without accelerators."""
    kind = accelerator_kind()
    if kind is None:
        return []
    return [DeviceSpec(kind, i) for i in range(torch_runtime(DeviceSpec(kind)).device_count())]


def torch_runtime(spec: DeviceSpec) -> Any:
    """Return ``torch.npu`` or ``torch.cuda``, which has the device.

    Raises:
        DeviceUnavailable: The device, its driver, or what torch needs for it is missing.
    """
    import torch

    if spec.kind == "npu":
        _import_torch_npu(spec, torch.__version__)
    elif torch.version.cuda is None:
        raise DeviceUnavailable(
            f"cannot use {spec}: torch {torch.__version__} is built without CUDA", hint=_DOCTOR
        )
    runtime = getattr(torch, spec.kind)
    count = runtime.device_count()
    if spec.ordinal >= count:
        raise _not_there(spec, count)
    return runtime


def _import_torch_npu(spec: DeviceSpec, torch_version: str) -> None:
    """Import it here and not through torch, which could only fail as a whole."""
    if importlib.util.find_spec("torch_npu") is None:
        raise DeviceUnavailable(
            f"cannot use {spec}: torch_npu is not installed",
            hint=f"install the one that belongs to torch {torch_version} and to your CANN: "
            "`sllmctl doctor` says which",
        )
    try:
        with redirect_stdout(sys.stderr):  # where it prints its warnings
            importlib.import_module("torch_npu")
    except Exception as exc:  # ImportError without CANN, a bare Exception where it is half there
        reason = str(exc).strip().partition("\n")[0]
        raise DeviceUnavailable(
            f"cannot use {spec}: torch_npu cannot be loaded: {reason}",
            hint=f"source CANN's set_env.sh; {_DOCTOR}",
        ) from exc


def _not_there(spec: DeviceSpec, count: int) -> DeviceUnavailable:
    name = _VISIBLE[spec.kind]
    visible = os.environ.get(name)
    if count:
        shown = f", by {name}={visible}" if visible is not None else ""
        there = f"{spec.kind}:0 to {spec.kind}:{count - 1}" if count > 1 else f"{spec.kind}:0"
        return DeviceUnavailable(
            f"there is no {spec}: torch sees {there}{shown}",
            hint=f"devices count from 0 among those that {name} leaves visible",
        )
    if visible is not None:
        return DeviceUnavailable(
            f"cannot use {spec}: torch sees no device, with {name}=`{visible}`",
            hint=f"unset {name}, or name in it the devices to use",
        )
    return DeviceUnavailable(f"cannot use {spec}: torch sees no device", hint=_DOCTOR)


def free_memory_bytes(spec: DeviceSpec) -> int:
    """What torch can still allocate: what is free on a device, and what torch holds unused.

    Raises:
        DeviceError: The device does not work.
    """
    if spec.kind == "cpu":
        return available_memory_bytes()
    runtime = torch_runtime(spec)
    # The runtime answers for the thread's current device, whichever is asked about.
    with _asking_torch(spec), runtime.device(spec.ordinal):
        free, _ = runtime.mem_get_info(spec.ordinal)
        unused = runtime.memory_reserved(spec.ordinal) - runtime.memory_allocated(spec.ordinal)
    return int(free + unused)


def check_device_memory(spec: DeviceSpec, needed_bytes: int) -> None:
    """Refuse a load that a device has no room for, before it starts.

    Raises:
        DeviceError: Less is free than needed; on the host it is `HostMemoryError`.
    """
    free = free_memory_bytes(spec)
    if needed_bytes <= free:
        return
    if spec.kind == "cpu":
        raise HostMemoryError(
            f"the load needs {format_size(needed_bytes)} of memory, and "
            f"{format_size(free)} are available",
            hint="use `stream_tensors`, free memory, or raise the container's limit",
        )
    raise DeviceError(
        f"the load needs {format_size(needed_bytes)} on {spec}, and {format_size(free)} are free",
        hint="stop other processes on the device, spread the load over several with a device_map, "
        "or use `stream_tensors`",
    )


def wait_for_torch(spec: DeviceSpec) -> None:
    """Let torch's work on a device end: memory that it hands out may still be in use there.

    Raises:
        DeviceError: The device does not work.
    """
    if spec.kind != "cpu":
        with _asking_torch(spec):
            torch_runtime(spec).current_stream(spec.ordinal).synchronize()


@contextmanager
def _asking_torch(spec: DeviceSpec) -> Iterator[None]:
    try:
        yield
    except RuntimeError as exc:
        reason = str(exc).strip().partition("\n")[0]
        raise DeviceError(
            f"torch cannot use {spec}: {reason}", hint="`sllmctl doctor --deep` tries the devices"
        ) from exc

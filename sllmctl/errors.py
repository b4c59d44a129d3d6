"""Every exception that sllmctl raises on purpose.

```
SllmError                        what the CLI reports in one line; .hint, .exit_code
├─ ConfigError (ValueError)      a setting contradicts itself or the machine
├─ CheckpointError               its own: CheckpointNotFound (FileNotFoundError), ChecksumMismatch
├─ HubError                      a model hub refused, failed or cannot be reached
├─ StoreError                    its own: StoreUnreachable (ConnectionError)
└─ NativeError                   .status .os_errno .device_code; its own: ReadError (OSError),
                                 HostMemoryError (MemoryError), DeviceError and below it
                                 DeviceUnavailable
```

A message is one line that names file, place and numbers; the hint is the next step.
"""

from __future__ import annotations

from typing import ClassVar


class SllmError(Exception):
    """Base of all. ``str(error)`` is one line of text; ``hint`` says what to do next."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class ConfigError(SllmError, ValueError):
    """A setting is invalid, or does not fit another setting or the machine."""

    kind = "config"


class CheckpointError(SllmError):
    """A checkpoint is damaged, incomplete or malicious."""

    kind = "checkpoint"


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at this place."""

    kind = "checkpoint_not_found"


class ChecksumMismatch(CheckpointError):
    """Bytes differ from the digest taken when the checkpoint was written."""

    kind = "checksum_mismatch"


class HubError(SllmError):
    """A model hub cannot be reached, failed, or refused the request."""

    kind = "hub"


class StoreError(SllmError):
    """The checkpoint store answered with an error."""

    kind = "store"
    exit_code = 5


class StoreUnreachable(StoreError, ConnectionError):
    """No store answers at the socket."""

    kind = "store_unreachable"


class NativeError(SllmError):
    """The native library reported a failure.

    Attributes:
        status: The ``SLLM_E_*`` code.
        os_errno: The system's error number, or 0.
        device_code: The device runtime's code, or 0.
    """

    kind = "native"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int = 0,
        os_errno: int = 0,
        device_code: int = 0,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.os_errno = os_errno
        self.device_code = device_code


class ReadError(NativeError, OSError):
    """A file could not be read to its end."""

    kind = "read"


class HostMemoryError(NativeError, MemoryError):
    """Host memory could not be allocated."""

    kind = "host_memory"


class DeviceError(NativeError):
    """A device call failed."""

    kind = "device"


class DeviceUnavailable(DeviceError):
    """The machine lacks the device, its driver or its runtime library."""

    kind = "device_unavailable"
    exit_code = 4

"""The native library as Python types. The only importer of ``_native``.

Handles end when the last reference goes; what a failing call says becomes an exception of
``errors.py``. Ctrl-C is answered within 0.3 s, but for three calls while a runtime hangs: giving a
ring's memory back, unregistering a file, and ending a gather on a thread whose current device is
another.
"""

from sllmctl.native.calls import abi_version, status_name
from sllmctl.native.devices import Device, Gather, Registered, Ring
from sllmctl.native.job import Extent, Job, Progress
from sllmctl.native.memory import FileFacts, Memory, Segment, probe_file

PAGE_BYTES = 4096
"""What direct reads are aligned to."""

__all__ = [
    "PAGE_BYTES",
    "Device",
    "Extent",
    "FileFacts",
    "Gather",
    "Job",
    "Memory",
    "Progress",
    "Registered",
    "Ring",
    "Segment",
    "abi_version",
    "probe_file",
    "status_name",
]

"""What is not in the file system: the process, its limits, its interpreter."""

from __future__ import annotations

import locale
import os
import platform
import re
import resource
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

UNLIMITED = -1


@dataclass(frozen=True, slots=True)
class Host:
    """One machine and one process on it.

    Attributes:
        machine: ``uname -m``.
        dac_override: Whether the process may pass over file permissions.
        glibc: Such as "2.35", or "" where it is another C library.
        memlock_bytes, open_files: Soft limits; -1 is unlimited.
        sys_path: Where the interpreter looks for packages.
        terminal: Encoding of text.
    """

    machine: str = "x86_64"
    kernel: str = ""
    euid: int = 0
    groups: tuple[int, ...] = (0,)
    dac_override: bool = True
    glibc: str = ""
    python: str = "3.11.9"
    free_threaded: bool = False
    bits: int = 64
    prefix: str = "/usr"
    executable: str = "/usr/bin/python3"
    sys_path: tuple[str, ...] = ()
    user_site: str = ""
    home: str = "/root"
    user: str = "root"
    name: str = "localhost"
    cwd: str = "/"
    encoding: str = "utf-8"
    memlock_bytes: int = UNLIMITED
    open_files: int = UNLIMITED
    env: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls) -> Host:
        """This process on this machine."""
        library, version = platform.libc_ver()
        return cls(
            machine=platform.machine(),
            kernel=platform.release(),
            euid=os.geteuid(),
            groups=tuple({os.getegid(), *os.getgroups()}),
            dac_override=_has_capability(1),
            glibc=version if library == "glibc" else "",
            python=platform.python_version(),
            free_threaded=not getattr(sys, "_is_gil_enabled", lambda: True)(),
            bits=64 if sys.maxsize > 2**32 else 32,
            prefix=sys.prefix,
            executable=sys.executable,
            sys_path=tuple(p or _cwd() for p in sys.path),
            user_site=_user_site(),
            home=os.path.expanduser("~"),  # noqa: PTH111
            user=_user(),
            name=socket.gethostname(),
            cwd=_cwd(),
            encoding=locale.getpreferredencoding(False).lower(),
            memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            env=_environment(),
        )

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> Host:
        """A machine from a document: keys are the fields, what is missing has its default."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in description.items() if key in known}
        for key in ("groups", "sys_path"):
            if key in values:
                values[key] = tuple(values[key])
        values["env"] = {str(name): str(said) for name, said in values.get("env", {}).items()}
        return cls(**values)


def _environment() -> dict[str, str]:
    """The environment as a person has it: `sllmctl` sets one variable for itself."""
    name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    env = {key: value for key, value in os.environ.items() if key != name}
    try:
        with open("/proc/self/environ", "rb") as started:  # noqa: PTH123
            found = re.search(rb"(?:^|\0)" + name.encode() + rb"=([^\0]*)", started.read())
    except OSError:
        found = None
    return {**env, name: os.fsdecode(found[1])} if found else env


def _cwd() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # the directory is gone
        return "/"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in containers
        return ""


def _user_site() -> str:
    import site

    return site.getusersitepackages() if site.ENABLE_USER_SITE else ""


def _has_capability(bit: int) -> bool:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123
            for line in status:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> bit & 1)
    except (OSError, ValueError):
        pass
    return os.geteuid() == 0

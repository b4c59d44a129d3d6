"""What `--fix` may do: few things, on this machine alone, each of which can be taken back."""

from __future__ import annotations

import contextlib
import os
import posixpath
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from sllmctl.doctor.checks.environment import STUB
from sllmctl.doctor.checks.network import bypass
from sllmctl.doctor.checks.nnal import set_env
from sllmctl.doctor.checks.sllm_store import built_glog, package_of
from sllmctl.doctor.examine import Examination
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.text import Text, say
from sllmctl.errors import ConfigError

ENV_FILE = "sllmctl-env.sh"
OLD = ".old"  # the end of the name under which a file that was replaced is kept


@dataclass(frozen=True, slots=True)
class Action:
    """One step: what it does, how to take it back, and the checks that it mends."""

    name: str
    checks: tuple[str, ...]
    what: Text
    undo: str
    after: Text | None
    apply: Callable[[], None]


def plan(done: Examination) -> list[Action]:
    """The steps that mend what was found, none if nothing of it can be mended here."""
    wanted: dict[str, list[str]] = {}
    for outcome in done.outcomes:
        if outcome.finding.action:
            wanted.setdefault(outcome.finding.action, []).append(outcome.check.id)
    makers = {"libglog": _libglog, "deep_ep": _deep_ep, "env": _environment}
    return [makers[name](done.machine, tuple(ids)) for name, ids in wanted.items()]


def _libglog(m: Machine, ids: tuple[str, ...]) -> Action:
    package = package_of(m) or ""
    source, target = built_glog(m, package) or "", f"{package}/libglog.so"
    # A copy: a link into `build` breaks with the next `rm -rf build`.
    return Action(
        "libglog",
        ids,
        say("copy {source} to {target}", source=source, target=target),
        _undo(m, target),
        None,
        lambda: _replace(m, target, lambda made: shutil.copyfile(_real(m, source), made)),
    )


def _deep_ep(m: Machine, ids: tuple[str, ...]) -> Action:
    found = m.dists.get("deep-ep")
    site = found.site if found else ""
    name = posixpath.basename(m.probe.glob(f"{site}/deep_ep/deep_ep_cpp*.so")[0])
    target = f"{site}/{name}"
    return Action(
        "deep_ep",
        ids,
        say("link {target} to deep_ep/{name}", target=target, name=name),
        _undo(m, target),
        None,
        lambda: _replace(m, target, lambda made: os.symlink(f"deep_ep/{name}", made)),  # noqa: PTH211
    )


def _environment(m: Machine, ids: tuple[str, ...]) -> Action:
    target = posixpath.join(m.probe.host.cwd, ENV_FILE)
    text = env_script(m)

    def write(made: str) -> None:
        with open(made, "w", encoding="utf-8") as script:  # noqa: PTH123
            os.fchmod(script.fileno(), 0o600)  # paths and proxies may hold passwords
            script.write(text)

    return Action(
        "env",
        ids,
        say("write {target}, which sets the environment right", target=target),
        _undo(m, target),
        say("now run: source {target}", target=target),
        lambda: _replace(m, target, write),
    )


def env_script(m: Machine) -> str:
    """A script to source: CANN and NNAL afresh, without what spoiled the environment."""
    lines = ["# Sets up this shell for Ascend. Written by `sllmctl doctor --fix`; source it."]
    if m.cann is not None:
        lines += [
            "unset ASCEND_HOME_PATH ASCEND_TOOLKIT_HOME ASCEND_OPP_PATH ASCEND_AICPU_PATH",
            "unset ATB_HOME_PATH",
        ]
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        kept = [
            entry
            for entry in m.env.get(name, "").split(":")
            if entry
            and not STUB.search(entry)
            and m.cann_of(entry) is None
            and "/nnal/" not in entry
        ]
        lines.append(f"export {name}={shlex.quote(':'.join(dict.fromkeys(kept)))}")
    if m.cann is not None:
        lines.append(f"source {shlex.quote(m.set_env)}")
    if m.nnal:
        abi = "" if m.torch_abi is None else f" --cxx_abi={m.torch_abi}"
        lines.append(f"source {shlex.quote(set_env(m))}{abi}")
    lines.append(
        "export LD_LIBRARY_PATH=$(echo \"$LD_LIBRARY_PATH\" | tr : '\\n' | "
        "grep -Ev '^$|/(stub|devlib)(/|$)' | paste -sd:)"
    )
    lines.append(bypass(m))
    lines.append(
        "unset ASCEND_SLOG_PRINT_TO_STDOUT ATB_LOG_LEVEL ASDOPS_LOG_LEVEL HCCL_ENTRY_LOG_ENABLE"
    )
    lines.append("export ASCEND_GLOBAL_LOG_LEVEL=3")
    return "\n".join(lines) + "\n"


def _undo(m: Machine, target: str) -> str:
    """The command that brings back what stands in the place now, or nothing."""
    place, link = shlex.quote(target), m.probe.readlink(target)
    if link is not None:
        return f"ln -sfn {shlex.quote(link)} {place}"
    return f"mv {shlex.quote(target + OLD)} {place}" if m.probe.exists(target) else f"rm {place}"


def _real(m: Machine, path: str) -> str:
    real = m.probe.real(path)
    if real is None:
        raise ConfigError(f"`{path}` cannot be reached")
    return real


def _replace(m: Machine, target: str, make: Callable[[str], object]) -> None:
    """Make a file beside its place and move it there: half a file never stands there.

    The move replaces a link itself, not what it leads to; a file that was there is kept beside.
    """
    parent = _real(m, posixpath.dirname(target))
    place, made = f"{parent}/{posixpath.basename(target)}", f"{parent}/.sllmctl-{os.getpid()}"
    try:
        make(made)
        if m.probe.readlink(target) is None and m.probe.exists(target):
            os.replace(place, place + OLD)  # noqa: PTH105
        os.replace(made, place)  # noqa: PTH105
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(made)  # noqa: PTH108
        raise ConfigError(
            f"cannot write `{target}`: {exc.strerror or exc}", hint="run it as the owner"
        ) from exc

"""A machine in a directory, so that a test, or a colleague's copy of files, is a whole machine.

Its files lie below the root; what no file can say (device nodes, commands, ports, limits) stands
in `machine.json` beside them.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sllmctl.doctor.host import Host
from sllmctl.doctor.probe import RUN_TIMEOUT_S, Node, Probe, Ran, Space
from sllmctl.doctor.store_answer import Answer
from sllmctl.errors import ConfigError

DESCRIPTION = "machine.json"


class TreeProbe(Probe):
    """A machine in a directory: files below ``root``, the rest in its `machine.json`.

    Raises:
        ConfigError: That file is damaged.
    """

    def __init__(self, root: Path) -> None:
        path = root / DESCRIPTION
        try:
            self._description = _describe(path)
            host = Host.described(self._description.get("host", {}))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as exc:
            raise ConfigError(f"`{path}` describes no machine: {exc}") from exc
        super().__init__(host, os.path.realpath(root))

    def real(self, path: str) -> str | None:
        """Where the bytes lie, inside the root."""
        found = self._walk(path)
        return None if found is None or self._shut(found) else self.root + found

    def realpath(self, path: str) -> str:
        """The path without links, as the machine in the tree would name it."""
        return self._walk(path) or path

    def stat(self, path: str) -> Node | None:
        """What a path leads to; described nodes come first."""
        node = self._node(path)
        if node is None:
            return super().stat(path)
        return Node(
            node.get("kind", "char"),
            int(node.get("mode", 0o660)),
            int(node.get("uid", 0)),
            int(node.get("gid", 0)),
        )

    def listdir(self, path: str) -> list[str]:
        """Names in the tree, and of described nodes."""
        here = path.rstrip("/")
        if self._node(here) is not None and not self.may(here, os.R_OK):
            return []
        made = {
            posixpath.basename(name)
            for name in self._description.get("nodes", {})
            if posixpath.dirname(name) == here
        }
        return sorted({*super().listdir(path), *made} - ({DESCRIPTION} if not here else set()))

    def may(self, path: str, mode: int) -> bool:
        """Access as the described user has it."""
        node = self.stat(path)
        if node is None:
            return False
        if self._node(path) is None:  # the tree's own files belong to whoever unpacked it
            return os.access(self.real(path) or "", mode)
        if self.host.dac_override:
            return True
        shift = (
            6 if node.uid == self.host.euid
            else 3 if node.gid in self.host.groups
            else 0
        )  # fmt: skip
        return (node.mode >> shift & 7) & mode == mode

    def run(self, argv: Sequence[str], timeout_s: float = RUN_TIMEOUT_S) -> Ran:
        """A described command."""
        ran = self._description.get("commands", {}).get(" ".join(argv))
        if ran is None:
            return Ran(127)
        return Ran(ran.get("code", 0), ran.get("out", ""), ran.get("err", ""))

    def connects(self, host: str, port: int) -> bool:
        """Whether the port is a described one."""
        return port in self._description.get("ports", [])

    def ask_store(self, path: str) -> Answer:
        """A described answer."""
        said = self._description.get("stores", {}).get(path)
        return Answer("no socket") if said is None else Answer(**said)

    def get(self, url: str, timeout_s: float = 3.0, *, direct: bool = True) -> tuple[int, str]:
        """A described answer."""
        status, body = self._description.get("http", {}).get(url, (0, "connection refused"))
        return int(status), str(body)

    def space(self, path: str) -> Space | None:
        """A described size, of the path or the nearest parent."""
        spaces = self._description.get("space", {})
        for place in _upwards(path):
            if place in spaces:
                return Space(*spaces[place])
        return None

    def direct_io(self, directory: str) -> bool | None:
        """A described answer, of the path or the nearest parent."""
        answers = self._description.get("direct_io", {})
        return next((answers[place] for place in _upwards(directory) if place in answers), None)

    def _shut(self, path: str) -> bool:
        """Whether a described directory above a path keeps the described user out."""
        nodes = self._description.get("nodes", {})
        return any(
            place in nodes and nodes[place].get("kind") == "dir" and not self.may(place, os.X_OK)
            for place in _upwards(path)[1:]
        )

    def _node(self, path: str) -> dict[str, Any] | None:
        node: dict[str, Any] | None = self._description.get("nodes", {}).get(path)
        return node

    def _walk(self, path: str, links: int = 40) -> str | None:
        """Follow the links of a path inside the root; absolute targets stay inside it too."""
        done: list[str] = []
        todo = [part for part in path.split("/") if part not in ("", ".")]
        while todo:
            part = todo.pop(0)
            if part == "..":
                done = done[:-1]
                continue
            here = self.root + "/" + "/".join([*done, part])
            try:
                target = os.readlink(here)  # noqa: PTH115
            except (OSError, ValueError):
                done.append(part)
                continue
            links -= 1
            if links < 0:
                return None
            if target.startswith("/"):
                done = []
            todo = [p for p in target.split("/") if p not in ("", ".")] + todo
        return "/" + "/".join(done)


def _describe(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(description, dict):
        raise TypeError("it is no object")
    for name, value in description.items():
        if not isinstance(value, list if name == "ports" else dict):
            raise TypeError(f"`{name}` is no {'list' if name == 'ports' else 'object'}")
    return description


def _upwards(path: str) -> list[str]:
    """A path and all its parents."""
    places = [path.rstrip("/") or "/"]
    while places[-1] != "/":
        places.append(posixpath.dirname(places[-1]) or "/")
    return places

"""The deployment files start `serve` with options that it has, at a socket that clients look at."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from sllmctl import cli
from sllmctl.core.units import parse_size
from sllmctl.store.protocol import SYSTEM_SOCKET

DEPLOY = Path(__file__).parents[2] / "docs" / "guides" / "deploy"
SERVE: Any = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]


def containerfile() -> str:
    return (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")


def document(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def entrypoint() -> list[str]:
    words: list[str] = yaml.safe_load(
        re.search(r"^ENTRYPOINT (.*)$", containerfile(), re.M)[1]  # type: ignore[index]
    )
    return words


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of `sllmctl serve ...`, as its own parser reads them."""
    assert words[:2] == ["sllmctl", "serve"]
    values: dict[str, Any] = SERVE.make_context("serve", words[2:]).params
    return values


def the_unit() -> list[str]:
    text = (DEPLOY / "sllmctl.service").read_text().replace("\\\n", " ")
    command = re.search(r"^ExecStart=(.*)$", text, re.M)[1]  # type: ignore[index]
    words = shlex.split(command.replace("%%", "%"))
    return ["sllmctl", *words[1:]]


def the_daemonset() -> list[str]:
    container = document("daemonset.yaml")["spec"]["template"]["spec"]["containers"][0]
    return [*entrypoint(), *container["args"]]


@pytest.mark.parametrize("words", [entrypoint(), the_unit(), the_daemonset()])
def test_serve_takes_the_options_and_listens_where_clients_look(words: list[str]) -> None:
    assert parsed(words)["socket"] == SYSTEM_SOCKET


def test_the_daemonset_has_memory_for_its_pool_and_a_probe_of_the_port_it_opens() -> None:
    spec = document("daemonset.yaml")["spec"]["template"]["spec"]
    container = spec["containers"][0]
    options = parsed(the_daemonset())
    limit = container["resources"]["limits"]["memory"]
    assert parse_size(limit + "B") >= parse_size(options["mem_pool_size"]) + 2**30
    (port,) = container["ports"]
    assert options["metrics"].endswith(f":{port['containerPort']}")
    assert container["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}


def test_the_pod_reaches_the_socket_that_the_daemonset_puts_on_the_host() -> None:
    store = document("daemonset.yaml")["spec"]["template"]["spec"]
    pod = document("pod.yaml")["spec"]
    places = [
        {
            mount["mountPath"]: volume["hostPath"]["path"]
            for volume in spec["volumes"]
            for mount in spec["containers"][0]["volumeMounts"]
            if mount["name"] == volume["name"]
        }
        for spec in (store, pod)
    ]
    assert places[0] == places[1]
    (variable,) = pod["containers"][0]["env"]
    assert variable == {"name": "SLLMCTL_SOCKET", "value": str(SYSTEM_SOCKET)}
    assert str(SYSTEM_SOCKET.parent) in places[1]


def test_the_container_installs_all_that_serve_imports() -> None:
    words = re.search(r"pip install --no-cache-dir (typer.*?) &&", containerfile())[1].split()  # type: ignore[index]
    project = (DEPLOY.parents[2] / "pyproject.toml").read_text()
    needed = re.findall(
        r'^    "([\w-]+)', project.split("\ndependencies = [")[1].split("]")[0], re.M
    )
    assert set(words) < set(needed)
    left_out = sorted(set(needed) - set(words))
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({left_out}))  # each import of one fails\n"
        "import sllmctl.cli, sllmctl.commands.serve, sllmctl.store.daemon, sllmctl.store.metrics\n"
        "import sllmctl.commands.store, sllmctl.core.verify, sllmctl.console\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

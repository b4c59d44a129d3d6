"""Imports follow the layers: cli, commands, api, (store,) core, native."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sllmctl

PACKAGE = Path(sllmctl.__file__).parent
ANYONE = {"errors", "core.units", "core.progress", ""}
RANKS = {
    "__main__": 90,
    "cli": 80,
    "commands": 70,
    "console": 65,
    "bench": 64,
    "transformers": 62,
    "integrations": 60,
    "doctor": 55,
    "api": 50,
    "store": 40,
    "core": 30,
    "native": 20,
    "_native": 10,
}
PRINTERS = {"cli", "commands", "console", "core.hub.child"}
HEAVY = {"torch", "transformers", "huggingface_hub", "modelscope", "numpy", "safetensors", "rich"}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__").rstrip(".")


def layer(module: str) -> str:
    return module.split(".")[0]


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module of ours that a file imports, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sllmctl":
            base = (node.module or "").removeprefix("sllmctl").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                known = inner in MODULES or inner == "_native"
                found.append((inner if known else base, node.lineno))
        elif isinstance(node, ast.Import):
            found += [
                (alias.name.removeprefix("sllmctl").lstrip("."), node.lineno)
                for alias in node.names
                if alias.name.split(".")[0] == "sllmctl"
            ]
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_downwards(module: str) -> None:
    for imported, line in imports(MODULES[module]):
        if imported in ANYONE or layer(imported) == layer(module):
            continue
        assert RANKS[layer(imported)] < RANKS[layer(module)], (
            f"{module}:{line} imports {imported}, which is not below it"
        )


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_only_the_top_prints(module: str) -> None:
    if module in PRINTERS or layer(module) in PRINTERS:
        return
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not calls, f"{module} prints on lines {calls}"


def test_only_native_imports_the_compiled_module() -> None:
    importers = {
        module
        for module, path in MODULES.items()
        if any(name == "_native" for name, _ in imports(path))
    }
    assert {layer(module) for module in importers} == {"native"}


@pytest.mark.parametrize("module", ["sllmctl", "sllmctl.cli", "sllmctl.api", "sllmctl.core.load"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    allowed = {"rich"} if module == "sllmctl.cli" else set()  # typer may bring rich along
    assert not (loaded & HEAVY) - allowed


def test_every_file_has_one_job() -> None:
    long = {m: n for m, p in MODULES.items() if (n := len(p.read_text().splitlines())) > 450}
    assert not long

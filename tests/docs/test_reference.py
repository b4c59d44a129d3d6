"""The pages of `docs/reference/` list what the code has, all of it and nothing else."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import rich.console
from typer.testing import CliRunner

import sllmctl
import sllmctl.transformers
from docs import c_api, generate
from sllmctl import cli
from sllmctl.core.dtypes import DTYPE_BITS
from sllmctl.core.rings import READERS

REFERENCE = generate.REFERENCE
STALE = "stale: run `python -m docs.generate`"
TERMINAL = 78  # Click leaves two of a terminal's 80 columns empty.


def words(text: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, text))


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (REFERENCE / name).read_text() == generate.PAGES[name](), STALE


# ---- command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", generate.commands(), ids=lambda command: command.name)
def test_help_and_page_have_the_same_options(command: generate.Command) -> None:
    shown = CliRunner().invoke(cli.app, [command.name, "--help"], terminal_width=200).output
    options = words(shown.partition("\nOptions:")[2], r"(?<!\S)--[a-z-]+")
    listed = {name for parameter in command.parameters for name in parameter.names}
    assert options - {"--help"} == {name for name in listed if name.startswith("--")}


@pytest.mark.parametrize("command", generate.commands(), ids=lambda command: command.name)
def test_examples_in_help_stand_on_one_line_each_at_80_columns(command: generate.Command) -> None:
    shown = CliRunner().invoke(cli.app, [command.name, "--help"], terminal_width=TERMINAL).output
    assert len(command.examples) == 2
    assert set(command.examples) <= {line.strip() for line in shown.splitlines()}


def test_the_list_of_commands_cuts_no_sentence_at_80_columns() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"], terminal_width=TERMINAL).output
    for command in generate.commands():
        (line,) = re.findall(rf"^  {command.name} +(.*)$", shown, re.MULTILINE)
        assert command.summary.startswith(line)
        assert line.endswith(".") and not line.endswith("...")


def test_help_and_page_have_the_same_commands() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"], terminal_width=200).output
    names = re.findall(r"^  ([a-z-]+) ", shown.partition("\nCommands:")[2], re.MULTILINE)
    assert names == [command.name for command in generate.commands()]


def test_the_error_in_the_page_is_what_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["sllmctl", "load", "Qwen/Qwen3-8B"])
    with pytest.raises(SystemExit):
        cli.main()
    (block,) = re.findall(r"^```\n(error: .*?)```$", generate.errors_page(), re.DOTALL | re.M)
    assert capsys.readouterr().err == block


def test_every_exit_code_of_an_exception_is_in_the_table() -> None:
    codes = generate.errors_page().partition("## Exit codes")[2]
    for kind in generate.exception_classes():
        assert f"| {kind.exit_code} |" in codes


# ---- environment -------------------------------------------------------------------------------

VARIABLE = re.compile(r"(?<![\w/])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+(?![\w(])")
# Read by a library that every command uses, and said to be honoured.
READ_BY_RICH = {"NO_COLOR"}
# Proxy variables are put together from a scheme and these endings.
PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}
NO_VARIABLES = {*DTYPE_BITS, "SC_PAGESIZE", "PAGE_BYTES"}


def strings_of(path: Path) -> Iterator[str]:
    """Every string of a module that is no docstring."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def variables_in_code() -> set[str]:
    """Every variable that sllmctl reads, sets or advises to set; `doctor` looks at many more."""
    found: set[str] = set()
    for path in generate.PACKAGE.rglob("*.py"):
        if not {"doctor", "bench"} & set(path.relative_to(generate.PACKAGE).parts):
            for text in strings_of(path):
                found |= words(text, VARIABLE.pattern)
    return found - NO_VARIABLES


def test_every_variable_of_the_code_is_in_the_page_and_none_else() -> None:
    page = (REFERENCE / "environment.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == variables_in_code() | READ_BY_RICH | PROXIES


def test_rich_honours_no_color() -> None:
    assert "NO_COLOR" in inspect.getsource(rich.console)


def test_defaults_in_the_environment_page_are_those_of_the_native_library() -> None:
    page = (REFERENCE / "environment.md").read_text()
    header = c_api.HEADER.read_text()
    ((threads, of_devices),) = re.findall(
        r"threads;\s+/\* readers, 1 to 64; 0: (\d+), for devices (\d+) \*/", header
    )
    assert int(of_devices) == READERS
    (chunk,) = re.findall(r"chunk_bytes;\s+/\* .*?; 0: (\d+) MiB \*/", header)
    assert f"1 to 64; `load --threads` | {threads}, to a device {READERS} |" in page
    assert f"`load --chunk-size` | `{chunk}MiB`, into the page cache 2MiB |" in page
    help_of_load = generate.cli_page()
    assert f"`$SLLMCTL_THREADS`, `{threads}`, to a device {READERS} |" in help_of_load
    assert f"`$SLLMCTL_CHUNK_SIZE`, `{chunk}MiB`, into the page cache 2MiB |" in help_of_load


# ---- Python ------------------------------------------------------------------------------------


def documented_signatures() -> dict[str, inspect.Signature]:
    """Name to signature, from the headings of the page and the code below them."""
    page = (REFERENCE / "python-api.md").read_text()
    blocks = re.findall(r"^## `([\w.]+)`\n\n```python\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    found = {}
    for name, code in blocks:
        scope: dict[str, Callable[..., Any]] = {}
        exec("from __future__ import annotations\n" + code, scope)
        found[name] = inspect.signature(scope[name.rpartition(".")[2]])
    return found


def public_functions() -> set[str]:
    names = {f"sllmctl.{name}" for name in sllmctl.__all__ if name != "__version__"}
    return names | {f"sllmctl.transformers.{name}" for name in sllmctl.transformers.__all__}


def test_the_page_has_every_public_function() -> None:
    assert set(documented_signatures()) == public_functions()


@pytest.mark.parametrize("name", sorted(public_functions()))
def test_a_documented_signature_is_the_real_one(name: str) -> None:
    module, _, function = name.rpartition(".")
    real = inspect.signature(getattr(import_module(module), function))
    bare = [p.replace(annotation=p.empty) for p in real.parameters.values()]
    assert list(documented_signatures()[name].parameters.values()) == bare


@pytest.mark.parametrize("name", sorted(public_functions()))
def test_every_parameter_of_a_function_is_explained(name: str) -> None:
    page = (REFERENCE / "python-api.md").read_text()
    opening, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    (section,) = (text for text in sections if text.startswith(f"`{name}`"))
    prose = opening + re.sub(r"```.*?```", "", section, flags=re.DOTALL)
    for parameter in documented_signatures()[name].parameters:
        asked = {"model", "source"} if parameter == "model_path" else {parameter}
        assert any(f"`{word}`" in prose or f"*{word}*" in prose for word in asked), parameter


# ---- C -----------------------------------------------------------------------------------------


def test_the_page_and_the_header_have_the_same_names() -> None:
    page = (REFERENCE / "c-api.md").read_text()
    header = c_api.HEADER.read_text()
    interface = header.split("/* [cdef] */")[1]
    assert words(page, r"\bSLLM_\w+|\bsllm_\w+") <= words(header, r"\bSLLM_\w+|\bsllm_\w+")
    assert words(interface, r"\bSLLM_\w+|\bsllm_\w+") <= words(page, r"\bSLLM_\w+|\bsllm_\w+")


def test_every_function_of_the_header_has_a_heading() -> None:
    interface = c_api.HEADER.read_text().split("/* [cdef] */")[1]
    plain = re.sub(r"/\*.*?\*/", "", interface, flags=re.DOTALL)
    declared = re.findall(r"^[a-z][^\n;{]*?\b(sllm_\w+)\(", plain, re.MULTILINE)
    page = (REFERENCE / "c-api.md").read_text()
    assert re.findall(r"^### `(\w+)`", page, re.MULTILINE) == declared


def test_every_status_code_is_in_the_table() -> None:
    from sllmctl import native

    table = {name: number for name, number, _ in c_api.statuses()}
    assert {native.status_name(number) for number in table.values()} == set(table)
    header = c_api.HEADER.read_text()
    assert set(table) == words(header, r"\bSLLM_E_\w+\b|\bSLLM_OK\b")


def test_the_example_compiles_and_reads_a_file(tmp_path: Path) -> None:
    page = (REFERENCE / "c-api.md").read_text()
    (program,) = re.findall(r"^```c\n(#include.*?)^```", page, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^```sh\n(cc .*?)\n```", page, re.MULTILINE)
    (tmp_path / "example.c").write_text(program)
    (tmp_path / "native").symlink_to(c_api.HEADER.parents[1])
    subprocess.run(f"{command} -Wall -Wextra -Werror", shell=True, cwd=tmp_path, check=True)
    (tmp_path / "file").write_bytes(bytes(123_457))
    done = subprocess.run(
        [tmp_path / "example", tmp_path / "file"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("123457 bytes, of which ")
    missing = subprocess.run([tmp_path / "example", tmp_path / "nothing"], check=False)
    assert missing.returncode == 2

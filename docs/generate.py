"""Write the pages of `docs/reference/` that follow the code: `python -m docs.generate`.

`cli.md` comes from the declarations that `--help` shows, `errors.md` from the exception classes,
`c-api.md` from the header, the tables of `../benchmarks.md` from the results of a run.
`tests/docs` fails when a page is stale.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, get_args

import typer
from typer.models import ArgumentInfo, OptionInfo

import sllmctl
from docs import c_api
from sllmctl import cli, errors
from sllmctl.bench import markdown
from sllmctl.bench.document import read_document
from sllmctl.bench.report import RESULTS
from sllmctl.commands.verify import EXIT_PROBLEMS

REFERENCE = Path(__file__).parent / "reference"
BENCHMARKS = REFERENCE.parent / "benchmarks.md"
PACKAGE = Path(sllmctl.__file__).parent
NOTICE = "<!-- Written by docs/generate.py; `python -m docs.generate` brings it up to date. -->"
_DEFAULT = re.compile(r"\s*\[default: ([^\]]*)\]$")
_NO_PROSE = ("<!--", "#", "|", "```", "- ", "Every byte")
_METAVARS = {"str": "TEXT", "int": "N", "Path": "PATH"}


class Parameter(NamedTuple):
    """An argument or an option as the page shows it."""

    names: tuple[str, ...]
    value: str
    meaning: str
    default: str

    def cell(self) -> str:
        """Names and value, for the first column of a table."""
        names = ", ".join(f"`{name}`" for name in self.names)
        return f"{names} `{self.value}`" if self.value else names


class Command(NamedTuple):
    """A command as the page shows it."""

    name: str
    summary: str
    examples: tuple[str, ...]
    parameters: tuple[Parameter, ...]


def commands() -> list[Command]:
    """Every command, in the order of `sllmctl --help`."""
    return [
        _command(info.callback, info.name or info.callback.__name__)
        for info in cli.app.registered_commands
        if info.callback is not None
    ]


def common_parameters() -> tuple[Parameter, ...]:
    """What stands before the command."""
    assert cli.app.registered_callback is not None
    callback = cli.app.registered_callback.callback
    assert callback is not None
    return tuple(_parameters(callback))


def _command(function: Callable[..., Any], name: str) -> Command:
    text = inspect.getdoc(function) or ""
    summary, _, rest = text.partition("\n\nExamples:\n\n")
    examples = tuple(line.strip() for line in rest.splitlines() if line.strip())
    return Command(name, " ".join(summary.split()), examples, tuple(_parameters(function)))


def _parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind, info = get_args(parameter.annotation)
        assert isinstance(info, ArgumentInfo | OptionInfo)
        meaning, default = info.help or "", _default(parameter.default)
        if written := _DEFAULT.search(meaning):
            words = written[1].split(", ")
            default = ", ".join(word if " " in word else f"`{word}`" for word in words)
            meaning = meaning[: written.start()]
        if info.envvar:
            default = ", ".join(filter(None, [f"`${info.envvar}`", default]))
        # In Annotated, Typer takes the first declaration for a default.
        declared = [info.default, *(info.param_decls or ())]
        names = tuple(n for n in declared if isinstance(n, str) and n.startswith("-"))
        value = info.metavar if info.metavar is not None else _value(kind)
        if isinstance(info, ArgumentInfo):
            value += "..." if "list" in str(kind) else ""
            required = parameter.default is inspect.Parameter.empty
            names, value = (value if required else f"[{value}]",), ""
        yield Parameter(names, value, meaning, default)


def _value(kind: Any) -> str:
    """What stands behind an option of this type."""
    while parts := [part for part in get_args(kind) if part is not type(None)]:
        kind = parts[0]
    if issubclass(kind, Enum):
        return "|".join(member.value for member in kind)
    return "" if kind is bool else _METAVARS[kind.__name__]


def _default(value: Any) -> str:
    if value in (None, False, 0, "", inspect.Parameter.empty):
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def cli_page() -> str:
    """The text of `cli.md`."""
    parts = [
        NOTICE,
        "# Command line",
        "`sllmctl [OPTIONS] COMMAND …`, or `python -m sllmctl …`. `-h` or `--help` shows the same "
        "as this page. `sllmctl --install-completion` sets up tab completion.",
        _option_table(common_parameters()),
        "A MODEL that starts with `/`, `./`, `../` or `~` is a path; anything else is a name below "
        "the storage path, such as `Qwen/Qwen3-8B`, or, if there is none, an existing relative "
        "directory. Sizes are written like `512MiB`, `4GB` or `4096`; a GB is 10⁹ bytes, a GiB "
        "2³⁰.",
        "Results go to stdout; progress, warnings and errors to stderr. `--json` writes "
        "[one document](json.md), `--quiet` only the one value that a script needs. See also the "
        "[exit codes](errors.md#exit-codes), and the [environment variables](environment.md) that "
        "set defaults.",
    ]
    for command in commands():
        arguments = [p for p in command.parameters if not p.names[0].startswith("-")]
        options = [p for p in command.parameters if p.names[0].startswith("-")]
        usage = " ".join(["sllmctl", command.name, *(p.names[0] for p in arguments), "[OPTIONS]"])
        parts += [f"## `{usage}`" if arguments else f"## `sllmctl {command.name} [OPTIONS]`"]
        parts += [command.summary]
        parts += ["```console\n" + "\n".join(f"$ {e}" for e in command.examples) + "\n```"]
        if arguments:
            rows = [[argument.cell(), argument.meaning] for argument in arguments]
            parts += [_table(["argument", "meaning"], rows)]
        parts += [_option_table(options)]
    return _page(parts)


def _page(parts: Sequence[str]) -> str:
    """Join the parts of a page; prose is wrapped."""
    prose = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    lines = [part if part.startswith(_NO_PROSE) else prose.fill(part) for part in parts]
    return "\n\n".join(lines) + "\n"


def _option_table(options: Sequence[Parameter]) -> str:
    rows = [[option.cell(), option.meaning, option.default] for option in options]
    return _table(["option", "meaning", "default"], rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def exception_classes() -> list[type[errors.SllmError]]:
    """Every class of `errors.py`, in its order."""
    return [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.SllmError)
    ]


def unused_classes() -> set[str]:
    """Names of the classes that nothing outside `errors.py` mentions, nor any class below them."""
    mentioned = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for path in PACKAGE.rglob("*.py")
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    classes = exception_classes()
    used = {kind for kind in classes if kind.__name__ in mentioned}
    return {k.__name__ for k in classes if not any(issubclass(one, k) for one in used)}


def errors_page() -> str:
    """The text of `errors.md`."""
    unused = unused_classes()
    rows, reserved = [], []
    for kind in exception_classes():
        if kind.__name__ in unused:
            reserved.append(f"`{kind.__name__}`")
            continue
        ours = [base for base in kind.__bases__ if issubclass(base, errors.SllmError)]
        builtin = [base for base in kind.__bases__ if base not in ours and base is not Exception]
        rows.append(
            [
                f"`{kind.__name__}`",
                f"`{ours[0].__name__}`" if ours else "",
                ", ".join(f"`{base.__name__}`" for base in builtin),
                f"`{kind.kind}`",
                str(kind.exit_code),
                (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("``", "`"),
            ]
        )
    columns = ["class", "subclass of", "and of", "`kind` in JSON", "exit code", "meaning"]
    codes = [
        ["0", "done"],
        ["1", "failed; stderr says why"],
        ["2", "the command line was wrong"],
        [str(EXIT_PROBLEMS), "the command worked and found problems: `verify`, `doctor`"],
        [
            str(errors.DeviceUnavailable.exit_code),
            "the machine lacks a device, its driver or a library",
        ],
        [str(errors.StoreError.exit_code), "the store cannot be reached, or refused the request"],
        [
            str(cli.EXIT_BUG),
            "a bug: run the command again as `sllmctl --debug …` and report the traceback",
        ],
        [str(cli.EXIT_INTERRUPTED), "interrupted"],
        [str(cli.EXIT_PIPE), "the program that read the output has ended"],
    ]
    parts = [
        NOTICE,
        "# Errors",
        "A command that fails writes one line to stderr that names the file, the place and the "
        "numbers, and usually a hint that says what to do next:",
        "```\nerror: there is no checkpoint `Qwen/Qwen3-8B` in `models`\n\n"
        "hint: run `sllmctl convert Qwen/Qwen3-8B` to download and convert it, "
        "or give --storage-path\n```",
        "In Python, the same error is an exception of `sllmctl.errors`: `str(error)` is the line, "
        "`error.hint` the hint (or None). Where a builtin exception fits, it is that too, so "
        "`except FileNotFoundError` works. With `--json`, the [error document](json.md#errors) "
        "goes to stdout as well.",
        _table(columns, rows),
    ]
    if reserved:
        parts.append(f"{', '.join(reserved)}: reserved; nothing raises them in this version.")
    parts += [
        "`NativeError` and its subclasses have `status` (a code of "
        "[the C library](c-api.md#status-codes)), `os_errno` and `device_code`; 0 means none.",
        "## Exit codes",
        _table(["code", "meaning"], codes),
    ]
    return _page(parts)


def c_page() -> str:
    """The text of `c-api.md`."""
    return _page([NOTICE, *c_api.paragraphs()])


def benchmarks_page() -> str:
    """The text of `benchmarks.md`: its tables follow the results of a run."""
    results = BENCHMARKS.parent / "benchmarks" / RESULTS
    document = read_document(results) if results.exists() else None
    return markdown.fill(BENCHMARKS.read_text(), document)


PAGES = {
    "cli.md": cli_page,
    "errors.md": errors_page,
    "c-api.md": c_page,
    "../benchmarks.md": benchmarks_page,
}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        path = (REFERENCE / name).resolve()
        path.write_text(page())
        typer.echo(path.relative_to(REFERENCE.parents[1]))


if __name__ == "__main__":
    main()

"""The command line: the Typer app, and exceptions to exit codes."""

from __future__ import annotations

import functools
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

from sllmctl import __version__
from sllmctl.commands import bench, convert, doctor, load, ls, serve, store, verify
from sllmctl.console import Console
from sllmctl.core.header import one_line, shown
from sllmctl.errors import SllmError

EXIT_LACKING = 4
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141

P = ParamSpec("P")

app = typer.Typer(
    name="sllmctl",
    help="""Load LLM weights as fast as the disk, memory and device link allow.

    Examples:

      sllmctl doctor

      sllmctl convert Qwen/Qwen3-8B
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        print(f"sllmctl {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            help="Log to stderr; -vv logs more.",
            metavar="",
            show_default=False,
        ),
    ] = 0,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.addLevelName(number, logging.getLevelName(number).lower())
    level = logging.WARNING - 10 * min(verbose, 2)
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("sllmctl").setLevel(level)


def _ending(command: Callable[P, None]) -> Callable[P, None]:
    """Give Ctrl-C and a closed pipe our exit codes before Typer gives them its own."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            _interrupted()
        except BrokenPipeError:
            _leave(EXIT_PIPE)

    return run


_COMMANDS = (
    convert.convert,
    serve.serve,
    load.load,
    store.status,
    store.warm,
    store.evict,
    verify.verify,
    ls.ls,
    bench.bench,
    doctor.doctor,
)
for _command in _COMMANDS:
    app.command()(_ending(_command))


def main() -> None:
    """Run the command line; a failure becomes one line and an exit code."""
    # A torch_npu without its CANN libraries makes `import torch` fail: torch loads backends by
    # entry point. Whoever needs one here imports it by name. What is set already may come from
    # torch_npu, which leaves a 1 to the children of every process that imported it.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    sys.unraisablehook = _lost
    _let_stdout_write_all()
    try:
        # Named, because the completion of `python -m sllmctl` would else be one for python.
        app(prog_name="sllmctl")
    except KeyboardInterrupt:
        _interrupted()
    except Exception as exc:
        if debug:
            raise
        error, code = _explain(exc)
        Console.choose(as_json="--json" in arguments, quiet=False).error(error, code)
        sys.exit(code)


def _explain(exc: Exception) -> tuple[SllmError, int]:
    """What to report of a failure, and its exit code."""
    if isinstance(exc, SllmError):
        return exc, exc.exit_code
    if isinstance(exc, MemoryError):
        return SllmError("this machine gave no more memory", hint="see `ulimit -v`"), 1
    if isinstance(exc, ImportError):
        hint = "`sllmctl doctor` says which packages are here and whether they fit together"
        return SllmError(f"cannot import a library: {one_line(exc)}", hint=hint), EXIT_LACKING
    if isinstance(exc, OSError) and exc.filename is not None:
        # Of a path that nobody expected to be refused: the machine's doing, not ours.
        return SllmError(f"{exc.strerror}: {shown(exc.filename)}"), 1
    hint = "this is a bug: run the command again with --debug and report the traceback"
    return SllmError(f"unexpected {type(exc).__name__}: {exc}", hint=hint), EXIT_BUG


def _let_stdout_write_all() -> None:
    """Names of files are bytes: no name may end a command that has done its work."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _lost(unraisable: sys.UnraisableHookArgs) -> None:
    """Repeat a Ctrl-C that met a finalizer, such as those of Python's own imports."""
    if unraisable.exc_type is KeyboardInterrupt:
        # Not at once: here it would be lost again.
        main_thread = threading.main_thread().ident
        timer = threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def _interrupted() -> None:
    print("interrupted", file=sys.stderr)
    _leave(EXIT_INTERRUPTED)


def _leave(code: int) -> None:
    """Exit at once: no flush of a pipe that nobody reads, no wait for threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass
    os._exit(code)

"""`sllmctl` and `python -m sllmctl`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line. A Ctrl-C while it is still being imported ends it without a word."""
    python_s_own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if python_s_own:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sllmctl import cli

    if python_s_own:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()

"""`python -m sllmctl`."""

from sllmctl.cli import main

main()

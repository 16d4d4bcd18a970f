"""Commands for those who work on Fathom itself."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from model.errors import UserError


def run(main: Callable[..., None]) -> None:
    """Runs a function as a command; a mistake of the user is one line and exit code 2."""
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

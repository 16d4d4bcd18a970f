"""`fathom board`: all runs in a browser, live."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[Path, typer.Argument(help="A run directory, or a folder of several.")] = Path("runs"),
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at. Others than 127.0.0.1 show your runs to whoever reaches them."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8642,
    interval: Annotated[
        float, typer.Option(min=1.0, max=86_400.0, help="Seconds between two looks of an open page.")
    ] = 10.0,
) -> None:
    """Show all runs in a browser, and each one's report while it goes on; ctrl-C ends it.

    Reads only. Nothing is sent to another machine.
    """
    from pretrain.board.pages import Board
    from pretrain.board.server import BoardServer

    with BoardServer(Board(runs), host, port, interval) as server:
        typer.echo(f"board: {server.address} shows {runs}; ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return

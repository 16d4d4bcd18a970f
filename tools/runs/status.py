"""`fathom status`: one screen for all runs under a folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from model.words import printable
from pretrain.cluster.status_cells import HEADINGS, NAME_WIDTH, RIGHT, cells

if TYPE_CHECKING:
    from pretrain.cluster.status import RunStatus

COLOURS = {
    "running": "green",
    "starting": "green",
    "finished": "bold green",
    "queued": "yellow",
    "requeued": "yellow",
    "stopped": "cyan",
    "cancelled": "magenta",
    "failed": "bold red",
    "dead": "bold red",
    "damaged": "bold red",
}
FIRST_TO_GO, LAST_TO_GO = ("TOKENS/S", "RESTARTS", "LEFT"), ("LOSS", "CHECKPOINT")
"""Columns that a narrow console does without.

The first ones to keep names on one line, the others only where nothing else helps.
"""
LEAST_NAME, GAP, PIPE_WIDTH = 8, 2, 140


def command(
    run: Annotated[Path, typer.Argument(help="A run directory, or a folder of several.")] = Path("runs"),
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Stay and look again every few seconds; ctrl-C leaves.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=1.0, max=86_400.0, help="Seconds between two looks of --watch.")
    ] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects instead.")] = False,
) -> None:
    """Show the state of runs.

    Step, loss, speed, time left, restarts, newest checkpoint, Slurm job.
    """
    from pretrain.cluster.status import collect

    if as_json:
        typer.echo(json.dumps([asdict(status) for status in collect(run)], indent=1))
        return
    console = Console()
    if not sys.stdout.isatty():  # a file or a pipe has no width of its own
        console.width = max(PIPE_WIDTH, console.width)
    if not watch:
        console.print(screen(collect(run), console.width))
        return
    try:
        with Live(
            screen(collect(run), console.width),
            console=console,
            screen=console.is_terminal,
            auto_refresh=False,
        ) as live:
            while True:
                time.sleep(interval)
                live.update(screen(collect(run), console.width), refresh=True)
    except KeyboardInterrupt:
        return


def screen(statuses: Sequence[RunStatus], width: int = PIPE_WIDTH) -> RenderableType:
    """The table, with a line below it for each run that has something to say.

    width: columns of the console; names and jobs are whole on any.
    """
    rows = [cells(status) for status in statuses]
    widths = {
        heading: max(cell_len(row[heading]) for row in (dict(zip(HEADINGS, HEADINGS, strict=True)), *rows))
        for heading in HEADINGS
    }
    for heading in FIRST_TO_GO:
        if _total(widths) > width:
            del widths[heading]
    for heading in LAST_TO_GO:
        if _total(widths | {"RUN": min(widths["RUN"], LEAST_NAME)}) > width:
            del widths[heading]
    # A long name goes on in the next line.
    # Nothing is cut off, as names and jobs are what other commands are given.
    widths["RUN"] = min(widths["RUN"], max(LEAST_NAME, width - (_total(widths) - widths["RUN"])))
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for heading in widths:
        name = heading in ("RUN", "JOB")
        table.add_column(
            heading,
            justify="right" if heading in RIGHT else "left",
            no_wrap=not name,
            overflow="fold" if name else "ellipsis",
            width=widths["RUN"] if heading == "RUN" else None,
        )
    for status, row in zip(statuses, rows, strict=True):
        table.add_row(
            *(
                Text(row[heading], style=COLOURS.get(status.state, "") if heading == "STATE" else "")
                for heading in widths
            )
        )
    whole = Table.grid()
    whole.add_row(table)
    remarks = [status for status in statuses if status.reason and status.state != "finished"]
    if remarks:
        whole.add_row("")
    for status in remarks:
        whole.add_row(
            Text.assemble((printable(status.name, NAME_WIDTH), "bold"), f": {printable(status.reason, 500)}")
        )
    return whole


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + GAP * (len(widths) - 1)

"""`fathom status`: one screen for all runs under a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pretrain.status import RunStatus

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


def command(
    run: Annotated[Path, typer.Argument(help="A run directory, or a folder of several.")] = Path("runs"),
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay and look again every few seconds; ctrl-C leaves.")] = False,
    interval: Annotated[float, typer.Option(min=1.0, help="Seconds between two looks of --watch.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects instead.")] = False,
) -> None:
    """Show the state of runs: step, loss, speed, time left, restarts, newest checkpoint, Slurm job."""
    from pretrain.status import collect

    if as_json:
        typer.echo(json.dumps([asdict(status) for status in collect(run)], indent=1))
        return
    console = Console()
    if not watch:
        console.print(screen(collect(run)))
        return
    try:
        with Live(screen(collect(run)), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(screen(collect(run)), refresh=True)
    except KeyboardInterrupt:
        return


def screen(statuses: Sequence[RunStatus]) -> RenderableType:
    """The table, with a line below it for each run that has something to say."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for heading in ("RUN", "STATE", "STEP", "LOSS", "TOKENS/S", "LEFT", "RESTARTS", "CHECKPOINT", "JOB"):
        right = heading in ("STEP", "LOSS", "TOKENS/S", "LEFT", "RESTARTS")
        # On a narrow terminal names give way: everything else is short.
        table.add_column(
            heading, justify="right" if right else "left", no_wrap=heading != "RUN", overflow="ellipsis", min_width=8 if heading == "RUN" else None
        )
    for status in statuses:
        table.add_row(
            status.name,
            Text(status.state, style=COLOURS.get(status.state, "")),
            f"{status.step}/{'?' if status.total is None else status.total}",
            "" if status.loss is None else f"{status.loss:.4f}",
            "" if status.tokens_per_s is None else quantity(status.tokens_per_s),
            "" if status.left_s is None else duration(status.left_s),
            str(status.restarts or ""),
            "none" if status.checkpoint_step is None else f"{status.checkpoint_step}, {duration(status.checkpoint_age_s or 0)} ago",
            status.job or "",
        )
    whole = Table.grid()
    whole.add_row(table)
    remarks = [status for status in statuses if status.reason and status.state != "finished"]
    if remarks:
        whole.add_row("")
    for status in remarks:
        whole.add_row(Text.assemble((status.name, "bold"), f": {status.reason}"))
    return whole


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: 45s, 12m30s, 3h05m, 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def quantity(number: float) -> str:
    """Three digits and a unit: 950, 12.3k, 1.25M."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5 or unit == "T":
            return f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError

"""`fathom doctor`: what this machine can do, and what to do about what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pretrain.cluster.doctor import Check

MARKS = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "failure": ("FAILURE", "bold red"),
}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Check this machine: GPUs, packages and their supported ranges, Transformer Engine and FP8,
    network, Slurm, limits.

    Leaves with 0 when training is possible, else with 1.
    """
    from pretrain.cluster.doctor import examine, training_possible

    found = examine()
    possible = training_possible(found)
    if as_json:
        typer.echo(
            json.dumps(
                {"training_possible": possible, "checks": [asdict(check) for check in found]}, indent=1
            )
        )
    else:
        console = Console()
        console.print(screen(found))
        console.print(
            "Training is possible on this machine."
            if possible
            else "Training is not possible on this machine before the failures above are mended."
        )
    if not possible:
        raise typer.Exit(1)


def screen(found: Sequence[Check]) -> RenderableType:
    """A row for each finding, its advice below it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found:
        label, style = MARKS[check.state]
        table.add_row(Text(label, style=style), Text(check.name, style="bold"), Text(check.found))
        if check.advice:
            table.add_row("", "", Text(f"-> {check.advice}", style="italic"))
    return table

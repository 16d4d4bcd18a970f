"""`fathom report`: the page that shows a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[
        Path, typer.Argument(help="Folder of the run, e.g. runs/NAME; the run may still be going on.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write the page; RUN/report.html unless given."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the path and the headline numbers as JSON.")
    ] = False,
) -> None:
    """Write a one-page HTML report of a run, pictures included.

    Lines of metrics.jsonl that are damaged are left out; how many is said.
    """
    from pretrain.report.run_report import damage, numbers, read_run, write_page

    found = read_run(run)
    path = write_page(found, out)
    if json_:
        typer.echo(json.dumps({"report": str(path), **numbers(found)}))
    elif not quiet:
        left_out = damage(found)
        typer.echo(f"report: {path}" + (f" ({left_out})" if left_out else ""))

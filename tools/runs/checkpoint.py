"""`fathom checkpoint`: list, inspect, verify and prune checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Checkpoints.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or its checkpoints folder.")]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="Run folder or checkpoints folder (both: the newest checkpoint), or one step folder.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("ls")
def list_(run: Run, as_json: AsJson = False) -> None:
    """List a run's checkpoints."""
    from rich.console import Console
    from rich.table import Table

    from pretrain.rundir.checkpoint_admin import leftovers, list_checkpoints, local_time, remarks

    rows, left, found = list_checkpoints(run), leftovers(run), remarks(run)
    if as_json:
        typer.echo(json.dumps({"checkpoints": rows, "leftovers": left, "findings": found}, indent=1))
        return
    table = Table("step", "written", "MB", "tokens", "layout", "")
    for column in (0, 2, 3):
        table.columns[column].justify = "right"
    for row in rows:
        if row["problem"]:
            table.add_row(str(row["step"]), "", "", "", "", "damaged")
            continue
        tokens = row["consumed_tokens"]
        layout = _layout(row["layout"])
        mark = "latest" if row["latest"] else ""
        table.add_row(
            str(row["step"]),
            local_time(row["time"]) or "",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{tokens:,}" if tokens is not None else "",
            layout,
            mark,
        )
    Console().print(table)
    for line in found:
        typer.echo(line)
    if left:
        typer.echo(
            "left over from saves that were killed (harmless; `fathom checkpoint prune` removes them): "
            f"{', '.join(left)}"
        )


@app.command()
def inspect(
    checkpoint: Checkpoint,
    names: Annotated[bool, typer.Option("--names", help="Every parameter with its shape.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds."""
    from pretrain.rundir.checkpoint_admin import checkpoint_facts

    facts = checkpoint_facts(checkpoint, names=names)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    shapes = facts.pop("shapes", {})
    for key, value in facts.items():
        typer.echo(f"{key}: {_text(value)}")
    for name, shape in shapes.items():
        typer.echo(f"{name}  {shape}")


@app.command()
def verify(
    checkpoint: Checkpoint,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Read a checkpoint whole and compare it with its checksums.

    Leaves with 2 and one line where anything is wrong.
    """
    from pretrain.rundir.checkpoint_admin import verify_checkpoint as run

    facts = run(checkpoint)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    elif not quiet:
        typer.echo(f"{facts['folder']}: {facts['files']} files and {facts['tensors']} tensors are whole")


@app.command()
def average(
    run: Run,
    last: Annotated[int, typer.Option(min=2, help="Newest checkpoints to take the mean of.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; if not given, average_STEP_of_LAST beside the checkpoints."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the mean of the weights of a run's last checkpoints as a checkpoint of its own."""
    from pretrain.rundir.average import average_checkpoints

    folder, steps = average_checkpoints(run, last, out)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "steps": steps}, indent=1))
    else:
        typer.echo(f"{folder}: the mean of {len(steps)} checkpoints, steps {', '.join(map(str, steps))}")


@app.command()
def prune(
    run: Run,
    keep_last: Annotated[int, typer.Option(min=1, help="Newest checkpoints that stay.")],
    keep_every: Annotated[
        int, typer.Option(min=0, help="Checkpoints whose step is a multiple of this stay too; 0: none.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints, and what killed saves left behind more than an hour ago.

    The one that `latest` names always stays.
    """
    from pretrain.rundir.checkpoint_admin import clean

    removed = clean(run, keep_last=keep_last, keep_every=keep_every, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(removed, indent=1))
        return
    verb = "would remove" if dry_run else "removed"
    what = [f"step {step}" for step in removed["steps"]] + removed["leftovers"]
    typer.echo(f"{verb}: {', '.join(what) or 'nothing'}")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={one}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _layout(layout: dict[str, int] | None) -> str:
    return " ".join(f"{key}{value}" for key, value in layout.items()) if layout else "imported"

"""`fathom config`: check a configuration and explain every field of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from model.config import ModelConfig
from model.parameters.size import parameter_count
from model.words import written
from pretrain.config.load import Row, explained, load_with_origins
from pretrain.config.schema import RunConfig
from pretrain.data.manifest import sized_model
from tools.shipped import say_shipped

PIPED_WIDTH = 160
LONGEST = 1000
"""Characters of a value in the table."""


def command(
    config: Annotated[str, typer.Argument(help="Configuration file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key.sub=value sets a value, +include=FILE merges a file; left to right."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Check only, print nothing.")] = False,
) -> None:
    """Check a configuration and explain every field of it, with its size in parameters.

    Checks all that depends on the configuration alone: what depends on the machine, the data or
    the number of processes is told by `fathom pretrain`.
    """
    if not quiet:
        say_shipped(config)
    loaded, composition = load_with_origins(config, overrides or [])
    model = sized_model(loaded)
    from pretrain.train.checks.feasibility import fit_configuration  # loads torch

    fit_configuration(loaded.model_copy(update={"model": model}))
    sizes = parameter_count(model) if model.vocab_size is not None else None
    rows = explained(loaded, composition)
    if quiet:
        return
    if as_json:
        fields = [dataclasses.asdict(row) for row in rows]
        typer.echo(
            json.dumps(
                {"config": loaded.model_dump(mode="json"), "parameters": sizes, "fields": fields},
                indent=2,
                default=list,
            )
        )
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    for section, members in itertools.groupby(
        rows, key=lambda row: row.key.partition(".")[0] if "." in row.key else "run"
    ):
        console.print(_table(section, list(members)), "")
    console.print("[bold]*[/] differs from the default.   [bold]![/] has no default.\n")
    console.print(Text(_summary(loaded, model, sizes)))


def _table(section: str, rows: list[Row]) -> Table:
    table = Table(
        title=section,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("", width=1)
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold", min_width=10)
    table.add_column("meaning", ratio=1)
    table.add_column("from", overflow="fold", style="dim", max_width=42)
    for row in rows:
        mark = "!" if row.required else "*" if row.changed else ""
        table.add_row(
            Text(mark, style="bold"),
            Text(row.key),
            Text(written(row.value, LONGEST), style="bold" if mark else ""),
            Text(row.description),
            Text(row.source),
        )
    return table


def _summary(config: RunConfig, model: ModelConfig, sizes: dict[str, int] | None) -> str:
    tokens = config.train.global_batch_size * config.data.seq_length
    whole = config.batch_sizes.before(config.train.steps) * config.data.seq_length
    lines = [f"Tokens per step {tokens:,}, in the whole run {whole:,}."]
    if sizes is not None:
        parts = ", ".join(
            f"{name.replace('_', ' ')} {count:,}"
            for name, count in sizes.items()
            if count and name != "total"
        )
        return "\n".join([f"Parameters {sizes['total']:,}: {parts}.", *lines])
    bare = parameter_count(model.model_copy(update={"vocab_size": model.vocab_multiple}))
    inside = bare["total"] - bare["word_embeddings"] - bare["output_layer"]
    path = config.data.corpora[0].path
    return "\n".join(
        [
            f"Parameters {inside:,} without the vocabulary, whose size is known once {path} is prepared.",
            *lines,
        ]
    )

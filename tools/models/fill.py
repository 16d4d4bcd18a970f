"""`fathom fill`: fill places in a text with the encoder of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run folder, its checkpoints folder, or one step folder.")
    ],
    text: Annotated[str, typer.Argument(help="Text with the mask token, such as [MASK], in its places.")],
    top: Annotated[int, typer.Option(min=1, help="Candidates to show for every place.")] = 5,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the filled text only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text and candidates as JSON.")] = False,
) -> None:
    """Fill places in a text with a trained encoder, on one CPU process and in fp32."""
    from pretrain.trained.fill import fill_text

    filled = fill_text(checkpoint, text, top)
    if as_json:
        typer.echo(json.dumps(asdict(filled), ensure_ascii=False))
        return
    for number, place in enumerate(() if quiet else filled.places, start=1):
        shown = "  ".join(f"{candidate.text!r} {candidate.probability:.3f}" for candidate in place)
        typer.echo(f"place {number}: {shown}")
    typer.echo(filled.text)

"""`fathom generate`: continue a text with the model of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run folder, its checkpoints folder, or one step folder.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue; empty starts a document.")] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens to add at most; a document may end before. "
            "Default: 64, or as many as the model has positions for.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; larger values are more varied.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the K likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens that together have this probability."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the new text only, without the prompt.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompt and continuation as JSON.")] = False,
) -> None:
    """Continue a text with a trained model, on one CPU process and in fp32."""
    from pretrain.trained.generate import generate_text

    pieces = generate_text(checkpoint, prompt, max_new_tokens, temperature, top_k, top_p, seed)
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "continuation": "".join(pieces)}, ensure_ascii=False))
        return
    typer.echo("" if quiet else prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()

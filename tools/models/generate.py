"""`fathom generate`: continue a text with a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tools.models.sampling import MaxTokens, Seed, Temperature, TopK, TopP, sampling_of


def command(
    model: Annotated[
        Path,
        typer.Argument(
            help="Run folder, its checkpoints folder, one step folder, or a folder of `fathom export`."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue; empty starts a document.")] = "",
    max_new_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the new text only, without the prompt.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompt and continuation as JSON.")] = False,
) -> None:
    """Continue a text with a trained model, on one CPU process and in fp32."""
    from pretrain.trained.generate import open_writer

    sampling = sampling_of(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    pieces = open_writer(model).text(prompt, sampling)
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "continuation": "".join(pieces)}, ensure_ascii=False))
        return
    typer.echo("" if quiet else prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()

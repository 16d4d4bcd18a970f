"""`fathom transcribe`: the words of recordings, as the model of a checkpoint hears them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tools.models.searching import Beam, LengthPenalty, MaxNewTokens, search_of


def command(
    model: Annotated[Path, typer.Argument(help="Run folder, its checkpoints folder, or one step folder.")],
    files: Annotated[list[Path], typer.Argument(help="Recordings, WAV or FLAC.")],
    beam: Beam = None,
    length_penalty: LengthPenalty = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Recordings at once; changes no text. Default: 8.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each recording, with its score.")
    ] = False,
) -> None:
    """Write what recordings say, or its translation, with a trained model of speech in fp32.

    One line of output for each recording, in order.
    """
    from pretrain.trained.transcribe import BATCH, open_transcriber
    from pretrain.trained.translate import translate

    settings = search_of(beam, length_penalty, max_new_tokens)
    transcriber = open_transcriber(model)
    live = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        print(f"\r{done}/{total} recordings", end="\n" if done == total else "", file=sys.stderr)

    names = [str(file) for file in files]
    found = translate(
        transcriber,
        names,
        settings,
        batch_size=batch_size or BATCH,
        names="recording",
        progress=progress if live else None,
    )
    for name, (best, *_) in zip(names, found, strict=True):
        content = {"recording": name, **asdict(best)}
        typer.echo(json.dumps(content, ensure_ascii=False) if as_json else best.line)

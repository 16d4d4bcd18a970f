"""`fathom translate`: translate lines of text with the model of a checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.models.searching import Beam, LengthPenalty, MaxNewTokens, search_of

if TYPE_CHECKING:
    from pretrain.trained.translate import Translation


def command(
    model: Annotated[
        Path,
        typer.Argument(
            help="Run folder, its checkpoints folder, one step folder, or a folder of `fathom export`."
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(help="File of sources, one a line; without it and --text: standard input."),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A text to translate, instead of a file; several are possible.")
    ] = None,
    beam: Beam = None,
    length_penalty: LengthPenalty = None,
    max_new_tokens: MaxNewTokens = None,
    best: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Print so many translations of each text, best first, each as its line's number, its score "
            "and its text with tabs between.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Texts at once; changes no translation. Default: 32.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each text, with scores.")
    ] = False,
) -> None:
    """Translate texts with a trained encoder-decoder in fp32, on one process.

    One line of output for each line of input, in order; a blank line stays blank.
    """
    from pretrain.trained.translate import open_translator, translate

    settings = search_of(beam, length_penalty, max_new_tokens, best)
    texts, names = _texts(file, text)
    translator = open_translator(model)
    live = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        print(f"\r{done}/{total} texts", end="\n" if done == total else "", file=sys.stderr)

    found = translate(
        translator,
        texts,
        settings,
        batch_size=batch_size,
        names=names,
        progress=progress if live else None,
    )
    for number, (source, translations) in enumerate(zip(texts, found, strict=True), start=1):
        for line in _lines(number, source, translations, scored=best is not None, as_json=as_json):
            typer.echo(line)


def _lines(
    number: int, source: str, translations: list[Translation], *, scored: bool, as_json: bool
) -> list[str]:
    """What is printed of a text."""
    if as_json:
        content = {"source": source, "translations": [asdict(one) for one in translations]}
        return [json.dumps(content, ensure_ascii=False)]
    if scored:
        return [f"{number}\t{one.score:.6f}\t{one.line}" for one in translations]
    return [translations[0].line if translations else ""]


def _texts(file: Path | None, text: list[str] | None) -> tuple[list[str], str]:
    """Texts, and what one of them is called. Raises UserError for a file that cannot be read."""
    from model.errors import UserError

    if text:
        if file is not None:
            raise UserError(f"give either the file {file} or --text, not both")
        return text, "--text"
    name = "standard input" if file is None else str(file)
    try:
        content = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}: name a file with one text a line") from None
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        del lines[-1]
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{name}, line {number}: no valid UTF-8 ({error.reason})") from None
    return texts, f"{name}, line"

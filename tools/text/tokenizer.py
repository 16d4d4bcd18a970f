"""`fathom tokenizer`: train a tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tools.text.data import TEXT_KEY

app = typer.Typer(help="Tokenizers.", no_args_is_help=True)


class Kind(str, Enum):
    """Kinds of tokenizers."""

    bpe = "bpe"
    unigram = "unigram"
    bpe_bytes = "bpe-bytes"


@app.callback()
def _group() -> None:
    """Tokenizers."""  # a callback keeps `train` a command of its own although it is the only one


@app.command()
def train(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...", help="Files, folders, globs or data set names, as for `fathom data prepare`."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, tokenizer.model if not given; with --kind bpe-bytes a folder (or "
            "tokenizer.json in it), which then also holds tokenizer_config.json.",
            show_default=False,
        ),
    ] = None,
    vocab_size: Annotated[
        int,
        typer.Option(min=1, max=1_000_000, help="Pieces of the vocabulary, including 256 bytes and 3 marks."),
    ] = 4096,
    kind: Annotated[
        Kind,
        typer.Option(
            "--kind",
            "--model",
            help="SentencePiece's bpe, which trains and encodes documents fastest, or its unigram; bpe-bytes "
            "is a Hugging Face tokenizer.json, byte-level as GPT-2's.",
        ),
    ] = Kind.bpe,
    max_bytes: Annotated[
        int, typer.Option(min=1, max=10**12, help="Bytes of text to train on at most; more input is sampled.")
    ] = 10_000_000,
    text_key: Annotated[str, typer.Option(help=TEXT_KEY)] = "text",
    streaming: Annotated[bool, typer.Option(help="Read a hub data set without downloading it whole.")] = True,
    special: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tokens for masked language modelling, which no text contains: mask, pad, cls, sep, with "
            "commas between them, each with a name of its own if you like (mask=<mask>); or all. "
            "sentinels=100 are as many for span corruption.",
        ),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE,TARGET",
            help="Read both sides of pairs, as `fathom data prepare --pairs` does, for a vocabulary of both.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Train a tokenizer that keeps every text exactly, indentation included."""
    from rich.console import Console

    from model.errors import UserError
    from pretrain.data.reading.pairs import Sides
    from pretrain.data.tokens.reserved import Reserved
    from pretrain.data.tokens.train import TRAINERS, Reading, special_names, train_tokenizer

    if pairs is not None and text_key != "text":
        raise UserError(f"--text-key {text_key} has no effect with --pairs: leave it out")
    reading = Reading(text_key, streaming, None if pairs is None else Sides.of(pairs))
    reserved = Reserved() if special is None else special_names(special)
    target = out or Path(TRAINERS[kind.value].file)
    with Console(stderr=True, quiet=quiet or as_json).status("training the tokenizer"):
        trained = train_tokenizer(inputs, target, vocab_size, kind.value, max_bytes, reading, reserved)
    if as_json:
        typer.echo(json.dumps(asdict(trained), indent=1))
    elif not quiet:
        pieces = f"{trained.vocab_size} pieces ({trained.model})"
        source = f"{trained.documents} documents, {trained.bytes / 1e6:.1f} MB"
        named = [*trained.special.values()]
        if trained.sentinels:
            named.append(f"{trained.sentinels} sentinels")
        marks = f"; special: {', '.join(named)}" if named else ""
        left_out = f"; {trained.broken} broken records left out" if trained.broken else ""
        typer.echo(f"{trained.path}: {pieces} from {source}{marks}{left_out}")

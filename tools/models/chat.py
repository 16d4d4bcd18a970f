"""`fathom chat`: try a model out, line by line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.models.sampling import MaxTokens, Seed, Temperature, TopK, TopP, sampling_of

if TYPE_CHECKING:
    from pretrain.trained.chat import Partner

RESET, QUIT = "/reset", "/quit"
COMMANDS = f"{RESET} forgets the text, {QUIT} or ctrl-D leaves, ctrl-C stops an answer"


def command(
    model: Annotated[
        Path,
        typer.Argument(
            help="Run folder, its checkpoints folder, one step folder, or a folder of `fathom export`."
        ),
    ],
    max_new_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Try a model out: each line is added to a text, and the model goes on with it.

    Of the text it reads what its longest sequence holds.
    An encoder-decoder translates each line by itself.
    /reset forgets the text, /quit or ctrl-D leaves, ctrl-C stops an answer.
    Lines may come from a pipe; then answers alone are printed.
    """
    from model.errors import UserError, say
    from pretrain.trained.chat import Translations, open_partner

    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    partner = open_partner(model, sampling_of(**given))
    useless = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if isinstance(partner, Translations) and useless:
        raise UserError(f"{', '.join(useless)}: no effect on {model}, which translates: leave it out")
    if sys.stdin is None:
        raise UserError("standard input is closed, from which lines are read: open it, or use a pipe")
    typed = sys.stdin.isatty()
    if typed:
        typer.echo(f"{partner.hint}. {COMMANDS}.", err=True)
    for line in _typed() if typed else _piped():
        if line == QUIT:
            return
        if line == RESET:
            partner.reset()
            continue
        try:
            _print(partner, line)
        except UserError as error:
            if not typed:
                raise
            say(str(error))


def _print(partner: Partner, line: str) -> None:
    """Prints an answer as it comes; ctrl-C stops it."""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in partner.answer(line):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    typer.echo()


def _typed() -> Iterator[str]:
    """Lines of a terminal, with a history; ctrl-C begins the line anew."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  `input` takes keys and history from it
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            typer.echo()
        except EOFError:
            typer.echo()
            return


def _piped() -> Iterator[str]:
    """Lines of a pipe or a file. Raises UserError for one that is no UTF-8."""
    from model.errors import UserError

    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input, line {number}: no valid UTF-8 ({error.reason})") from None

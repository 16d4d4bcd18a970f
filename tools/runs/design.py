"""`fathom design`: write a complete configuration for a size, a depth, a machine and a budget."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from model.depth.schemes import SCHEMES
from parallel.hardware.gpus import PLANNED

SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
MOST = 1e18
"""Of parameters and of tokens."""


def command(
    params: Annotated[str, typer.Option(help="Parameters, embedding included: 1.5B, 350M or 1.5e9.")],
    layers: Annotated[int, typer.Option(min=1, max=10_000, help="Layers.")],
    tokens: Annotated[str, typer.Option(help="Tokens to train on: 30e9 or 30B.")],
    gpus: Annotated[int, typer.Option(min=1, max=100_000, help="Number of GPUs.")] = 8,
    gpu: Annotated[str, typer.Option(help=f"Kind of GPU: {', '.join(PLANNED)}.")] = "h100",
    scheme: Annotated[str, typer.Option(help=f"Depth scheme: {', '.join(SCHEMES)}.")] = "deepscalelm_pre_ln",
    family: Annotated[str, typer.Option(help="Family of models; gpt.")] = "gpt",
    vocab_size: Annotated[
        int, typer.Option(min=2, max=10**7, help="Vocabulary of the data's tokenizer.")
    ] = 32000,
    seq_length: Annotated[int, typer.Option(min=8, max=1 << 20, help="Tokens of a sample.")] = 2048,
    data: Annotated[Path, typer.Option(help="Prepared data set.")] = Path("data/corpus"),
    name: Annotated[str | None, typer.Option(help="Name of the run; follows from the sizes.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.yaml without it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the choices as JSON; the file is written all the same.")
    ] = False,
) -> None:
    """Write a complete, commented configuration, and say in a line each how it was chosen."""
    from model.errors import UserError
    from model.files import atomic_write_text, check_output
    from pretrain.design.design import design, run_name
    from pretrain.design.text import configuration
    from pretrain.design.wish import Wish

    wish = Wish(
        params=_number("--params", params),
        layers=layers,
        gpu=gpu,
        gpus=gpus,
        tokens=_number("--tokens", tokens),
        scheme=scheme,
        family=family,
        vocab_size=vocab_size,
        seq_length=seq_length,
        data=data,
        name=name,
    )
    target = out or Path(f"{run_name(wish)}.yaml")
    check_output(target, "--out")
    if target.exists() and not overwrite:
        raise UserError(f"--out {target}: there is a file already; name another, or add --overwrite")
    found, _, _ = design(wish)
    if not as_json:
        for reason in found.reasons:
            typer.echo(reason)
    said = f"fathom design {shlex.join(sys.argv[2:])}" if sys.argv[1:2] == ["design"] else "fathom design"
    try:
        atomic_write_text(target, configuration(found, said))
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written: {error.strerror}") from error
    if as_json:
        content = {"file": str(target), "choices": [vars(choice) for choice in found.choices]}
        typer.echo(json.dumps(content, indent=1))
        return
    typer.echo(f"written: {target}; look at it with `fathom plan {target} --gpus {gpus} --gpu {gpu}`")


def _number(option: str, text: str) -> float:
    """A number with k, M, B or T after it. Raises UserError for anything else, and beyond MOST."""
    from model.errors import UserError
    from model.words import printable

    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]{1,4})?)([kmbt]?)", text.strip().lower())
    if match is None:
        raise UserError(f"{option} {printable(text, 60)}: give a number such as 1.5B, 350M or 30e9")
    value = float(match[1]) * SUFFIXES[match[2]]
    if not 1 <= value <= MOST:
        raise UserError(f"{option} {printable(text, 60)} must be at least 1 and at most 1e18")
    return value

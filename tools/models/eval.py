"""`fathom eval`: perplexity of a checkpoint, or how well it tells hidden tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.measured_on import BatchSize, Data, Split, Text, TextKey

if TYPE_CHECKING:
    from pretrain.trained.masked import Told
    from pretrain.trained.perplexity import Perplexity


def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Run folder, its checkpoints folder, or one step folder; of any parallel layout."
        ),
    ],
    data: Data = None,
    split: Split = None,
    text: Text = None,
    text_key: TextKey = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Windows to score, from the first on; default: all.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens between the starts of windows of --text; default: the window, so that none overlap.",
        ),
    ] = None,
    batch_size: BatchSize = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16; default: as in the run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure perplexity per token, byte and word, on one process, and on a GPU if there is one.

    Without --data and --text on the validation split of the run.
    Words are separated by white space; ends of documents count as tokens.
    Of an encoder: loss and accuracy on hidden tokens of a data set.
    """
    from model.errors import UserError
    from pretrain.trained.masked import evaluate_masked
    from pretrain.trained.open import open_trained
    from pretrain.trained.perplexity import evaluate

    if precision not in (None, "auto", "fp32", "bf16"):
        raise UserError(f"precision={precision!r} is not known; choose auto, fp32 or bf16")
    if split is not None and text:
        raise UserError(f"split={split} has no effect with --text: remove one of them")
    live = sys.stderr.isatty() and not as_json

    def progress(done: int, total: int) -> None:
        print(f"\r{done}/{total} windows", end="\n" if done == total else "", file=sys.stderr)

    trained = open_trained(checkpoint)
    if not trained.config.stack.causal:
        of_decoders = (("text", text), ("text-key", text_key), ("stride", stride))
        if unread := [f"--{name}" for name, value in of_decoders if value is not None]:
            raise UserError(
                f"{', '.join(unread)}: has no effect on an encoder, which is measured on hidden tokens "
                "of a data set: remove it, and name a data set with --data"
            )
        told = evaluate_masked(
            trained,
            data=data,
            split=split or "validation",
            samples=samples,
            batch_size=batch_size,
            precision=precision,
            progress=progress if live else None,
        )
        typer.echo(json.dumps(told.to_json()) if as_json else hidden_table(told))
        return
    result = evaluate(
        checkpoint,
        data=data,
        split=split or "validation",
        text=text or (),
        text_key=text_key,
        samples=samples,
        stride=stride,
        batch_size=batch_size,
        precision=precision,
        progress=progress if live else None,
    )
    typer.echo(json.dumps(result.to_json()) if as_json else table(result))


def hidden_table(told: Told) -> str:
    """What is told of hidden tokens, for people."""
    facts = told.to_json()
    perplexity = facts["pseudo_perplexity"]
    shown = "too large" if perplexity is None else f"{perplexity:,.4f}"
    return "\n".join(
        (
            f"{told.checkpoint}, {told.precision}",
            f"{told.data}: {told.samples:,} samples of {told.window} tokens, "
            f"{told.tokens:,} tokens hidden at a rate of {told.rate:g}",
            f"loss {facts['loss']:.5f} nats, pseudo-perplexity {shown}, accuracy {facts['accuracy']:.2%}",
        )
    )


def table(result: Perplexity) -> str:
    """The result for people."""
    overlap = "none overlapping" if result.stride == result.window else f"{result.stride} tokens apart"
    lines = [
        f"{result.checkpoint}, {result.precision}",
        f"{result.data}: {result.windows:,} windows of {result.window} tokens, {overlap}",
        f"{'per':>6} {'count':>14} {'nats':>10} {'bits':>10} {'perplexity':>14}",
    ]
    for unit in ("token", "byte", "word"):
        count = getattr(result, f"{unit}s")
        row = result.per(count)
        if row is None:
            lines.append(f"{unit:>6} {'-':>14}")
        else:
            perplexity = f"{row['perplexity']:,.4f}" if row["perplexity"] is not None else "too large"
            lines.append(f"{unit:>6} {count:>14,} {row['nats']:>10.5f} {row['bits']:>10.5f} {perplexity:>14}")
    return "\n".join(lines)

"""`fathom eval`: perplexity of a checkpoint, or how well it tells hidden tokens or classes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tools.measured_on import BatchSize, Data, Split, SplitName, Text, TextKey
from tools.models.searching import Beam, LengthPenalty, MaxNewTokens, search_of

if TYPE_CHECKING:
    from pretrain.trained.beam import Search
    from pretrain.trained.measures.classified import Classified
    from pretrain.trained.measures.clips import ToldClips
    from pretrain.trained.measures.masked import Told
    from pretrain.trained.measures.pairs import Told as ToldPairs
    from pretrain.trained.measures.perplexity import Perplexity
    from pretrain.trained.open import Kind, Trained

HARDLY = 0.01
"""Nats a token that a right source is worth where the decoder does not use it yet."""


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
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE,TARGET",
            help="Of an encoder-decoder, with --text: what the sides of pairs are called, as in "
            "`fathom data prepare`.",
        ),
    ] = None,
    translate: Annotated[
        bool,
        typer.Option(
            "--translate",
            help="Of an encoder-decoder: also translate, and give BLEU and chrF; of a model of speech: also "
            "write what it hears, and give error rates.",
        ),
    ] = False,
    wrong_source: Annotated[
        bool,
        typer.Option(
            "--wrong-source",
            help="Of an encoder-decoder: also the loss of each target beside another pair's source, which "
            "tells how much the decoder takes from the encoder.",
        ),
    ] = False,
    beam: Beam = None,
    length_penalty: LengthPenalty = None,
    max_new_tokens: MaxNewTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure perplexity per token, byte and word, on one process, and on a GPU if there is one.

    Without --data and --text on the validation split of the run.
    Words are separated by white space; ends of documents count as tokens.
    Of an encoder: loss and accuracy on hidden tokens of a data set, or on images.
    Of an encoder-decoder: loss of target tokens, and scores of translations.
    Of a model of speech: the same, and how many words it gets wrong.
    """
    from model.errors import UserError
    from model.words import printable
    from pretrain.trained.measures.classified import evaluate_images
    from pretrain.trained.measures.masked import evaluate_masked
    from pretrain.trained.measures.pairs import PairsAsked, evaluate_pairs
    from pretrain.trained.measures.perplexity import evaluate
    from pretrain.trained.open import DECODER, ENCODER, IMAGES, SPEECH, open_trained

    if precision not in (None, "auto", "fp32", "bf16"):
        raise UserError(f"--precision {printable(precision, 60)} is not known: choose auto, fp32 or bf16")
    if split is not None and text:
        raise UserError(f"--split {split.value} has no effect with --text: remove one of them")
    live = sys.stderr.isatty() and not as_json

    def progress(done: int, total: int) -> None:
        print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr)

    trained = open_trained(checkpoint)
    searching: dict[str, Any] = {
        "beam": beam,
        "length_penalty": length_penalty,
        "max_new_tokens": max_new_tokens,
    }
    options = {"text": text, "text_key": text_key, "stride": stride, "pairs": pairs, **searching}
    refuse_unread(
        trained.kind, options | {"translate": translate or None, "wrong_source": wrong_source or None}
    )
    if not translate and (given := [name for name, value in searching.items() if value is not None]):
        raise UserError(f"{_named(given)}: has no effect without --translate: remove it")
    searched = search_of(**searching) if translate else None
    common: dict[str, Any] = {"precision": precision, "progress": progress if live else None}
    measured: dict[str, Any] = {
        "data": data,
        "split": (split or SplitName.VALIDATION).value,
        "samples": samples,
    }
    measured["batch_size"] = batch_size
    if trained.kind is DECODER:
        told = evaluate(checkpoint, text=text or (), text_key=text_key, stride=stride, **measured, **common)
        typer.echo(json.dumps(told.to_json()) if as_json else table(told))
    elif trained.kind is ENCODER:
        hidden = evaluate_masked(trained, **measured, **common)
        typer.echo(json.dumps(hidden.to_json()) if as_json else hidden_table(hidden))
    elif trained.kind is IMAGES:
        seen = evaluate_images(trained, **measured, **common)
        typer.echo(json.dumps(seen.to_json()) if as_json else images_table(seen))
    elif trained.kind is SPEECH:
        typer.echo(_of_speech(trained, {**measured, **common}, searched, as_json))
    else:
        asked = PairsAsked(text=text or (), sides=pairs, **measured)
        found = evaluate_pairs(trained, asked, settings=searched, wrong=wrong_source, **common)
        typer.echo(json.dumps(found.to_json()) if as_json else pairs_table(found))


def _of_speech(trained: Trained, measured: dict[str, Any], settings: Search | None, as_json: bool) -> str:
    """What is told of a model of speech."""
    from pretrain.trained.measures.clips import evaluate_clips

    told = evaluate_clips(trained, settings=settings, **measured)
    return json.dumps(told.to_json(), ensure_ascii=False) if as_json else clips_table(told)


def clips_table(told: ToldClips) -> str:
    """What is told of clips, for people."""
    left_out = f"; {told.left_out:,} longer than a row are left out" if told.left_out else ""
    lines = [
        f"{told.checkpoint}, {told.precision}",
        f"{told.data}: {told.clips:,} clips, {told.tokens:,} target tokens{left_out}",
        f"loss {told.loss:.5f} nats",
    ]
    if (given := told.written) is None:
        return "\n".join(lines)
    lines.append(
        f"beam {given.beam}, length penalty {given.length_penalty:g}: {given.ended:,} have an end mark"
    )
    lines.append(
        f"word error rate {given.errors.words:.1%} of {given.errors.said:,} words, "
        f"{given.errors.plain_words:.1%} without case and punctuation; "
        f"of characters {given.errors.characters:.1%}; BLEU {given.bleu:.1f}"
    )
    for said, written in given.examples:
        lines += [f"  said     {said}", f"  written  {written}"]
    return "\n".join(lines)


def refuse_unread(kind: Kind, options: Mapping[str, object]) -> None:
    """Raises UserError for options that are given, not None, and say nothing to a kind of model."""
    from model.errors import UserError
    from pretrain.trained.open import BOTH, DECODER, ENCODER, IMAGES, SPEECH

    of_decoders, of_both = {"text", "text_key", "stride"}, options.keys() - {"text_key", "stride"}
    read, advice = {
        DECODER: (of_decoders, "a decoder, which is measured on text"),
        ENCODER: (set(), "an encoder, which is measured on hidden tokens of a data set (--data)"),
        IMAGES: (set(), "a model of images, which is measured on those of a data set (--data)"),
        BOTH: (of_both, "an encoder-decoder, which is measured on pairs of texts"),
        SPEECH: (
            {"beam", "length_penalty", "max_new_tokens", "translate"},
            "a model of speech, which is measured on clips of a data set (--data)",
        ),
    }[kind]
    if unread := [name for name, value in options.items() if value is not None and name not in read]:
        raise UserError(f"{_named(unread)}: has no effect on {advice}: remove it")


def _named(options: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in options)


def pairs_table(told: ToldPairs) -> str:
    """What is told of pairs, for people."""
    facts = told.to_json()
    perplexity = facts["perplexity"]
    shown = "too large" if perplexity is None else f"{perplexity:,.4f}"
    left_out = f"; {told.left_out:,} longer than a row are left out" if told.left_out else ""
    lines = [
        f"{told.checkpoint}, {told.precision}",
        f"{told.data}: {told.pairs:,} pairs, {told.tokens:,} target tokens{left_out}",
        f"loss {facts['loss']:.5f} nats, perplexity {shown}",
    ]
    if told.wrong_nats is not None:
        gain = (told.wrong_nats - told.nats) / told.tokens
        lines.append(
            f"with the sources of other pairs {facts['wrong_source_loss']:.5f} nats: "
            f"the right ones are worth {gain:.5f} nats a token"
            + (", so that the decoder hardly uses the encoder" if gain < HARDLY else "")
        )
    if told.translated is None:
        return "\n".join(lines)
    given = told.translated
    lines.append(
        f"beam {given.beam}, length penalty {given.length_penalty:g}: {given.ended:,} have an end mark"
    )
    lines.append(f"{'':>5} {'score':>7} {'copied':>7}  signature")
    for name, score in given.scores.items():
        lines.append(f"{name:>5} {score.value:>7.2f} {score.copied:>7.2f}  {score.signature}")
    return "\n".join(lines)


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


def images_table(told: Classified) -> str:
    """What is told of images, for people."""
    facts = told.to_json()
    return "\n".join(
        (
            f"{told.checkpoint}, {told.precision}",
            f"{told.data}: {told.images:,} images of {len(told.classes):,} classes",
            f"loss {facts['loss']:.5f} nats per image, accuracy {facts['accuracy']:.2%}, "
            f"top 5 {facts['top5']:.2%}",
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

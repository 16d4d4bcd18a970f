"""Perplexity of a checkpoint on prepared data or on text: per token, per byte and per word."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.tasks.task import perplexity
from pretrain.trained.measures.windows import Asked, Windows, open_windows

if TYPE_CHECKING:
    from pretrain.trained.open import Trained

Progress = Callable[[int, int], None]
# Keeps back a character of which only the first bytes are there.
_Decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class Perplexity:
    """Summed loss on tokens, and how much text the tokens spell."""

    checkpoint: str
    step: int
    data: str
    windows: int
    window: int
    stride: int
    precision: str
    nats: float
    """Summed loss of the predicted tokens."""
    tokens: int
    """How many were predicted, the ends of documents among them."""
    bytes: int | None
    """That these tokens spell.

    None where the checkpoint has no tokenizer that spells texts exactly.
    """
    words: int | None
    """That these tokens spell, separated by white space; None where `bytes` is."""

    def per(self, count: int | None) -> dict[str, float | None] | None:
        """nats, bits and perplexity per one of `count` units; None without units.

        A perplexity beyond the floating-point range is None.
        """
        if not count:
            return None
        nats = self.nats / count
        return {
            "nats": nats,
            "bits": nats / math.log(2),
            "perplexity": perplexity(nats),
        }

    def to_json(self) -> dict[str, object]:
        """All of it as plain data."""
        facts: dict[str, object] = {name: value for name, value in vars(self).items() if name != "nats"}
        return facts | {
            "total_nats": self.nats,
            **{f"per_{unit}": self.per(getattr(self, f"{unit}s")) for unit in ("token", "byte", "word")},
        }


class Units:
    """Bytes and words that tokens spell."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pieces = tokenizer.token_bytes()

    def count(self, ids: Sequence[int], first: int) -> tuple[int, int]:
        """(bytes, words) of ids[first:]; a word counts where it begins. Documents end words.

        Exact over all windows together, but for a white space of three bytes that the edge of a
        window cuts.
        """
        parts = [self.pieces[index] or b"\n" for index in ids]
        words = [
            len(_Decoder(errors="replace").decode(b"".join(some)).split()) for some in (parts, parts[:first])
        ]
        return sum(len(self.pieces[index]) for index in ids[first:]), words[0] - words[1]


def evaluate(
    checkpoint: Path | str,
    *,
    data: Path | str | None = None,
    split: str = "validation",
    text: Sequence[str] = (),
    text_key: str | None = None,
    samples: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Loss of a checkpoint's model on a split of a prepared data set, or on text files.

    data, text: neither means the run's own data set.
    text_key: key or column of the text in records of `text`; None: text.
    samples: windows to score, from the first on; None: all.
    stride: tokens from one window to the next, for text only.
    batch_size: windows at once; None: the run's micro_batch_size.
    precision: auto, fp32, bf16; None: the run's.
    The first `train.eval_samples` windows of the run's validation split are those that the trainer
    evaluates on.
    Raises UserError where data and model do not fit, or an argument has no effect.
    """
    from pretrain.trained.open import open_trained

    trained = open_trained(checkpoint, "perplexity")
    tokenizer = Tokenizer(trained.tokenizer) if trained.tokenizer else None
    asked = Asked(data, split, text, text_key, samples, None, stride, batch_size)
    found = open_windows(trained, tokenizer, asked)
    precision = precision or trained.reader.sections.train.precision or "auto"
    return _score(trained, tokenizer, found, precision, progress)


def _score(
    trained: Trained, tokenizer: Tokenizer | None, found: Windows, precision: str, progress: Progress | None
) -> Perplexity:
    from pretrain.trained.scorer import Scorer

    scorer = Scorer(trained, precision)
    scorer.end_mark = found.end_mark
    units = Units(tokenizer) if tokenizer and tokenizer.lossless else None
    nats, totals, done = torch.zeros((), dtype=torch.float64), np.zeros(3, dtype=np.int64), 0
    for batch, first in found.batches:
        losses = scorer.losses(batch)[:, first:]
        nats += losses.double().sum()
        for row in batch.tolist():
            totals += (len(row) - 1 - first, *(units.count(row, first + 1) if units else (0, 0)))
        done += len(batch)
        if progress:
            progress(done, found.count)
    tokens, size, words = (int(total) for total in totals)
    result = Perplexity(
        str(trained.reader.folder),
        trained.reader.step,
        found.data,
        done,
        found.window,
        found.stride,
        scorer.label,
        float(nats),
        tokens,
        size,
        words,
    )
    return result if units else replace(result, bytes=None, words=None)

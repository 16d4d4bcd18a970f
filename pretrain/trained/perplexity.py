"""Perplexity of a checkpoint on prepared data or on text: per token, per byte and per word.

Tokens are cut into windows as in training.
Documents follow each other in one stream, each ended by the end-of-document token.
A window may begin inside a document.
Without a stride, windows do not overlap: the first token of a window is seen by nothing before it
but the token it is predicted from.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.errors import UserError
from pretrain.data.tokenizer import Tokenizer
from pretrain.trained.text_tokens import read_text

if TYPE_CHECKING:
    from pretrain.trained.open import Trained

BATCH = 8
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
            "perplexity": math.exp(nats) if nats < 700 else None,
        }

    def to_json(self) -> dict[str, object]:
        """All of it as plain data."""
        facts: dict[str, object] = {name: value for name, value in vars(self).items() if name != "nats"}
        return facts | {
            "total_nats": self.nats,
            **{f"per_{unit}": self.per(getattr(self, f"{unit}s")) for unit in ("token", "byte", "word")},
        }


@dataclass(frozen=True)
class _Windows:
    """What is scored."""

    data: str
    count: int
    """Windows in all."""
    window: int
    stride: int
    batches: Iterator[tuple[Tensor, int]]
    """Windows [b, n + 1] with the first target that counts in each."""


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

    trained = open_trained(checkpoint)
    run = trained.reader.sections
    tokenizer = Tokenizer(trained.tokenizer) if trained.tokenizer else None
    if batch_size is None:
        batch_size = run.train.micro_batch_size or BATCH
    window = run.data.seq_length or trained.positions
    if data is not None and text:
        raise UserError("give either --data or --text, not both")
    if text_key is not None and not text:
        raise UserError(f"text_key={text_key} has an effect on --text only: data sets hold tokens")
    if text:
        ids, name = _tokens_of(text, tokenizer, text_key or "text")
        found = _text_windows(ids, name, window, stride, samples, batch_size)
    elif stride is not None:
        raise UserError(
            f"stride={stride} has an effect on --text only: windows of prepared data do not overlap"
        )
    else:
        found = _data_windows(trained, tokenizer, data, split, window, samples, batch_size)
    return _score(trained, tokenizer, found, precision or run.train.precision or "auto", progress)


def _score(
    trained: Trained, tokenizer: Tokenizer | None, found: _Windows, precision: str, progress: Progress | None
) -> Perplexity:
    from pretrain.trained.scorer import Scorer

    scorer = Scorer(trained, precision)
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


def _data_windows(
    trained: Trained,
    tokenizer: Tokenizer | None,
    data: Path | str | None,
    split: str,
    window: int,
    samples: int | None,
    batch_size: int,
) -> _Windows:
    from pretrain.config.errors import checked
    from pretrain.config.schema import Corpus
    from pretrain.data.blend import open_blend

    own = trained.reader.sections.data.cache
    corpora = trained.corpora() if data is None else [checked(Corpus, {"path": str(data)}, "--data: ")]
    cache = Path(own) if data is None and own else None
    blend = open_blend(corpora, split, window, 0, cache, alone=True)
    name = ", ".join(corpus.path for corpus in corpora)
    if blend.vocab_size != trained.config.vocab_size:
        raise UserError(
            f"data set {name} has a vocabulary of {blend.vocab_size}, "
            f"the model {trained.config.vocab_size}: prepare it with the model's tokenizer"
        )
    if tokenizer and blend.manifests[0].tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"data set {name} was prepared with another tokenizer than the model's, "
            f"{tokenizer.path}: prepare it with that one"
        )
    if len(corpora) == 1:
        samples = _limit(samples, blend.samples_per_epoch[0], f"the {split} split of {name}")
    elif samples is None:
        raise UserError(
            "the run blends several data sets, which has no end: give --samples, or name one with --data"
        )
    steps = range(0, samples, batch_size)
    batches = ((blend.batch(range(at, min(at + batch_size, samples))), 0) for at in steps)
    return _Windows(f"{split} split of {name}", samples, window, window, batches)


def _tokens_of(files: Sequence[str], tokenizer: Tokenizer | None, text_key: str) -> tuple[Tensor, str]:
    """The ids of text files, and what they are in words."""
    if tokenizer is None:
        advice = "put the tokenizer.model of its data there"
        raise UserError(f"--text needs a tokenizer, and the checkpoint has none: {advice}")
    found = read_text(files, tokenizer, text_key)
    name = f"{found.documents} document{'s' * (found.documents > 1)} of {', '.join(files)}"
    if found.broken:
        left_out = f"{found.broken} broken record{'s' * (found.broken > 1)} left out"
        name += f" ({left_out}, the first: {found.first_broken})"
    return found.ids, name


def _text_windows(
    ids: Tensor,
    name: str,
    window: int,
    stride: int | None,
    samples: int | None,
    batch_size: int,
) -> _Windows:
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"stride={stride} must lie between 1 and the window of {window} tokens")
    starts = list(range(0, max(len(ids) - 1 - window, 0) + stride, stride))
    starts = starts[: _limit(samples, len(starts), name)]
    return _Windows(name, len(starts), window, stride, _cut(ids, starts, window, stride, batch_size))


def _cut(
    ids: Tensor, starts: list[int], window: int, stride: int, batch_size: int
) -> Iterator[tuple[Tensor, int]]:
    """Windows [b, n + 1] with the first target that counts in each.

    First the first window alone, which counts whole.
    Then full windows in batches, of which the last `stride` targets count.
    Then what is left.
    """
    full = [start for start in starts[1:] if start + window < len(ids)]
    yield ids[starts[0] : starts[0] + window + 1][None], 0
    for at in range(0, len(full), batch_size):
        yield (
            torch.stack([ids[start : start + window + 1] for start in full[at : at + batch_size]]),
            window - stride,
        )
    for start in starts[1 + len(full) :]:
        yield ids[start : start + window + 1][None], window - stride


def _limit(samples: int | None, available: int, what: str) -> int:
    if samples is not None and samples > available:
        raise UserError(f"samples={samples}: {what} gives {available} windows only")
    return available if samples is None else samples

"""Texts with hidden spans: of a blend, by position."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.errors import UserError
from model.hf.tokenizer.table import tokenizer_file
from pretrain.config.schema import Corpus
from pretrain.config.sections.spans import SpanCounts, Spans, span_counts
from pretrain.data.blend import Blend, TokenBlend, open_blend
from pretrain.data.manifest import Manifest
from pretrain.data.order import Stream, sample_key
from pretrain.data.spans.corruption import corrupted, span_lengths
from pretrain.data.tokens.tokenizer import Tokenizer

MUCH_PADDING = 0.1
"""From this share on a side's length is worth changing."""


@dataclass(frozen=True)
class SpanVocabulary:
    """What hiding spans has to know about the tokens."""

    sentinels: np.ndarray
    """[k] ids, one for each span of a text, in order."""
    end: int
    padding: int
    """What fills a side up, hidden: where there is no token for it, the end mark."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, spans: int) -> SpanVocabulary:
        """For texts of so many spans. Raises UserError where there are fewer sentinels."""
        found = tokenizer.sentinels
        if len(found) < spans:
            raise UserError(
                f"tokenizer {tokenizer.path} has {len(found) or 'no'} sentinels, and spans.density and "
                f"spans.mean_length hide {spans} spans of a text: train one with `fathom tokenizer train "
                f"--special pad,sentinels={spans}` and prepare the data with it, or lower data.source_length"
            )
        padding = tokenizer.special.get("pad", tokenizer.eod_id)
        return cls(np.array(found[:spans], dtype=np.int64), tokenizer.eod_id, padding)


class SpanBlend(Blend):
    """Texts with hidden spans, of several data sets, mixed by weight. Made by `open_spans`."""

    def __init__(
        self,
        windows: TokenBlend,
        counts: SpanCounts,
        lengths: tuple[int, int],
        vocabulary: SpanVocabulary,
        seed: int | None,
    ) -> None:
        """windows: texts of counts.tokens tokens. lengths: of the source and the target side.

        seed: of the spans; None: the same spans in all runs.
        """
        super().__init__(windows._corpora, windows.weights)
        self.windows, self.counts, self.vocabulary, self.seed = windows, counts, vocabulary, seed
        self.source_length, self.seq_length = lengths

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """Returns the samples named, n of them, a pure function of their numbers.

        source [n, s_e], tokens [n, s_d]: what encoder and decoder read; the latter is the end mark
        and the target. labels [n, s_d]: the target, with its end mark. weights [n, s_d] in fp32: 1,
        or 0 for padding. source_documents, documents: 1, or 0 for padding.
        Raises IndexError for a negative number, UserError for damaged data.
        """
        pairs = [self.sample(int(index)) for index in indices]
        batch = self.blank(len(pairs))
        if pairs:
            sources, targets = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
            batch["source"][:, : self.counts.source] = sources
            batch["labels"][:, : self.counts.target] = targets
            batch["tokens"][:, 1 : self.counts.target] = targets[:, :-1]
        batch["weights"][:, : self.counts.target] = 1.0
        return batch

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of sample `index`, with end marks and without padding, int64."""
        tokens, _ = self.windows.window(index, self.vocabulary.padding)
        lengths = span_lengths(self.counts, sample_key("spans", self.seed, index))
        return corrupted(tokens, lengths, self.vocabulary.sentinels, self.vocabulary.end)

    def targets(self, indices: Iterable[int]) -> int:
        """Returns how many labels of these samples count. Reads no tokens."""
        return self.counts.target * sum(1 for _ in indices)

    @property
    def padding_share(self) -> float:
        """As `Blend`."""
        used = self.counts.source + self.counts.target
        return 1 - used / (self.source_length + self.seq_length)

    def tokens_before(self, sample: int) -> int:
        """As `Blend`: targets with sentinels and end marks. Sources and padding do not count."""
        return sample * self.counts.target

    def blank(self, count: int) -> dict[str, torch.Tensor]:
        """Returns a batch of `count` samples of the same form, without text and weights."""
        padding = self.vocabulary.padding
        source, tokens, labels = (
            torch.full((count, length), padding, dtype=torch.int64)
            for length in (self.source_length, self.seq_length, self.seq_length)
        )
        tokens[:, 0] = self.vocabulary.end
        return {
            "source": source,
            "tokens": tokens,
            "labels": labels,
            "weights": torch.zeros(count, self.seq_length),
            "source_documents": _ones(source, self.counts.source),
            "documents": _ones(tokens, self.counts.target),
        }

    def log_frequencies(self) -> torch.Tensor:
        """As `Blend`, of the labels: text, sentinels and the end mark."""
        text_v = self.windows.log_frequencies().exp() * (self.counts.hidden / self.counts.target)
        marks = torch.tensor([*self.vocabulary.sentinels.tolist(), self.vocabulary.end])
        text_v[marks] += 1 / self.counts.target
        return text_v.log()

    def report(self) -> list[str]:
        """What is hidden of a text, in a line."""
        counts = self.counts
        text = (
            f"span corruption: {counts.hidden} of {counts.tokens} tokens hidden in {counts.spans} "
            f"span{'s' * (counts.spans > 1)}; "
            f"sources of {counts.source} and targets of {counts.target} tokens"
        )
        sides = {"source_length": counts.source, "seq_length": counts.target}
        for name, used in sides.items():
            length = getattr(self, name)
            if 1 - used / length > MUCH_PADDING:
                text += f"; {1 - used / length:.0%} of data.{name}={length} is padding: set {used}"
        return [text]


def _ones(like: torch.Tensor, length: int) -> torch.Tensor:
    """1 in the first `length` places of rows, 0 behind them."""
    numbers = torch.zeros_like(like)
    numbers[:, :length] = 1
    return numbers


@dataclass(frozen=True)
class _Texts(Stream):
    """Windows of the stream of documents, as a decoder reads them."""

    @property
    def needs(self) -> str:
        return f"{self.seq_length + 1} for a text and the token after it"


def open_spans(
    corpora: list[Corpus],
    split: str,
    lengths: tuple[int, int],
    seed: int,
    cache: Path | None,
    settings: Spans,
    alone: bool = False,
) -> SpanBlend:
    """Opens a split of one or more data sets for span corruption.

    lengths: of the source and the target side. Splits other than "train" have spans that no seed
    changes. The other arguments, and what is raised, are those of `open_blend`; UserError also
    where the tokenizer has fewer sentinels than a text has spans.
    """
    counts = span_counts(settings, *lengths)
    windows = open_blend(corpora, split, counts.tokens, seed, cache, alone, _Texts(counts.tokens))
    vocabulary = SpanVocabulary.of(Tokenizer(tokenizer_file(corpora[0].path)), counts.spans)
    return SpanBlend(windows, counts, lengths, vocabulary, seed if split == "train" else None)


def label_entropy(manifest: Manifest, counts: SpanCounts) -> float | None:
    """Entropy in nats of the labels: the loss of a model that knows their frequencies.

    Hidden tokens have the frequencies of the train split, each sentinel and the end of the target
    occur once. None for a data set that does not know its entropy.
    """
    entropy, facts = manifest.unigram_entropy_nats, manifest.facts("", "train")
    if entropy is None:
        return None
    once, text = 1 / counts.target, counts.hidden / counts.target
    inside = text * facts.documents / facts.tokens  # end marks of documents
    # The end mark is one token, whether it ends a document or a target.
    ends = _part(inside + once) - _part(inside)
    return text * entropy + _part(text) + ends + counts.spans * _part(once)


def _part(probability: float) -> float:
    """What a token adds to an entropy."""
    return -probability * math.log(probability) if probability else 0.0

"""What a user may say about span corruption, and what follows for the lengths of samples.

Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4, with the arithmetic of their code.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from pydantic import Field, model_validator

from model.sections import Strict

LEAST = 3
"""Tokens of the shortest source, and of the shortest target: text, a sentinel and the end mark."""


class Spans(Strict):
    """Which share of a text is hidden, and in parts of which length."""

    density: float = Field(0.15, ge=0.001, le=0.9, description="Share of a text's tokens that is hidden.")
    mean_length: float = Field(
        3.0, ge=1, le=1000, description="Mean number of tokens of a hidden span. A sentinel stands for each."
    )

    @model_validator(mode="after")
    def _check(self) -> Spans:
        # Between two spans there is at least one token that is seen. .5 / 1 fits exactly.
        least = self.density / (1 - self.density)
        if self.mean_length < least - 1e-9:
            raise ValueError(
                f"spans.mean_length={self.mean_length:g} with spans.density={self.density:g} leaves less "
                "than one token between spans: "
                f"set spans.mean_length={least:.3g} or more, or a lower spans.density"
            )
        return self


@dataclass(frozen=True)
class SpanCounts:
    """What is hidden of every text of one length."""

    tokens: int
    """Of the text."""
    hidden: int
    spans: int

    @classmethod
    def of(cls, settings: Spans, tokens: int) -> SpanCounts:
        """Those of a text of 2 tokens or more. Halves are rounded to even, as in T5's code."""
        hidden = min(max(round(tokens * settings.density), 1), tokens - 1)
        spans = max(round(hidden / settings.mean_length), 1)
        return cls(tokens, hidden, min(spans, hidden, tokens - hidden))

    @property
    def source(self) -> int:
        """Tokens that the encoder reads: text, a sentinel for each span, the end mark."""
        return self.tokens - self.hidden + self.spans + 1

    @property
    def target(self) -> int:
        """Tokens to predict: each span after its sentinel, the end mark."""
        return self.hidden + self.spans + 1


def span_counts(settings: Spans, source_length: int, seq_length: int) -> SpanCounts:
    """The longest text whose source and target fit.

    source_length, seq_length: tokens that encoder and decoder read.
    Raises ValueError where none does.
    """
    for name, length in (("source_length", source_length), ("seq_length", seq_length)):
        if length < LEAST:
            raise ValueError(
                f"data.{name}={length} is too short for train.task=span_corruption: set {LEAST} or more"
            )

    def too_long(tokens: int) -> bool:
        counts = SpanCounts.of(settings, tokens)
        return counts.source > source_length or counts.target > seq_length

    # Neither side shrinks when the text grows.
    texts = range(2, source_length + seq_length)
    return SpanCounts.of(settings, texts[bisect_right(texts, False, key=too_long) - 1])

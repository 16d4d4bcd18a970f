"""Samples of tokens that no text has, for a probe without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from pretrain.config.schema import RunConfig
from pretrain.data.blend import TokenBlend
from pretrain.data.masked.masking import MaskVocabulary
from pretrain.data.masked.samples import MaskedBlend
from pretrain.data.samples import MaskedTokens, next_tokens
from pretrain.probe.measure import zipf_tokens
from pretrain.tasks.task import Batch, SampleKind


class _Windows:
    """What a `MaskedBlend` reads of a blend: samples of one document each."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.seq_length = tokens, tokens.shape[1]

    def window(self, index: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
        """As `TokenBlend.window`."""
        return self.tokens[index], np.ones(self.seq_length, np.int64)


def _next_token(config: RunConfig, vocab: int, batch: int, seed: int) -> Batch:
    return next_tokens(zipf_tokens(vocab, batch, config.data.seq_length + 1, seed))


def _masked(config: RunConfig, vocab: int, batch: int, seed: int) -> Batch:
    """The rarest token is the mask. All others are words."""
    tokens, none = zipf_tokens(vocab, batch, config.data.seq_length, seed), np.zeros(vocab, bool)
    mask = vocab - 1
    words = MaskVocabulary(mask, mask, none, np.arange(mask), begins=~none, ends=none)
    windows = cast(TokenBlend, _Windows(tokens.numpy()))
    return MaskedTokens(MaskedBlend(windows, config.masking, words, seed), config.model).batch(range(batch))


def _pairs(config: RunConfig, vocab: int, batch: int, seed: int) -> Batch:
    """One pair fills a row: sources and targets are drawn apart."""
    source_length = config.data.source_length or 0
    source = zipf_tokens(vocab, batch, source_length, 2 * seed + 1)
    return next_tokens(zipf_tokens(vocab, batch, config.data.seq_length + 1, 2 * seed)) | {"source": source}


SYNTHETIC: dict[SampleKind, Callable[[RunConfig, int, int, int], Batch]] = {
    "next_token": _next_token,
    "masked": _masked,
    "pairs": _pairs,
    "spans": _pairs,
}
"""From a run with its model, a vocabulary, a number of samples and a seed to a micro-batch."""

"""Samples that no text and no image gives, for a probe without data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from model.speech import FRAMES_PER_TOKEN
from pretrain.config.schema import RunConfig
from pretrain.data.blend import TokenBlend
from pretrain.data.masked.masking import MaskVocabulary
from pretrain.data.masked.samples import MaskedBlend
from pretrain.data.samples import MaskedTokens, next_tokens
from pretrain.probe.measure import zipf_log_frequencies, zipf_tokens
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


def _images(config: RunConfig, classes: int, batch: int, seed: int) -> Batch:
    """Standardised Gaussian pixels, whose patches correlate as the model was planned for."""
    image = config.model.image
    assert image is not None
    generator, shared = torch.Generator().manual_seed(seed), image.patch_correlation or 0.0
    (rows, columns), patch = image.grid, image.patch
    one = torch.randn(batch, image.channels, patch, patch, generator=generator).repeat(1, 1, rows, columns)
    own = torch.randn(batch, *image.shape, generator=generator)
    labels = torch.randint(classes, (batch, 1), generator=generator)
    return {"images": math.sqrt(shared) * one + math.sqrt(1 - shared) * own, "labels": labels}


def _clips(config: RunConfig, vocab: int, batch: int, seed: int) -> Batch:
    """One clip fills a row, and its frames have nothing in common."""
    speech, places = config.model.speech, FRAMES_PER_TOKEN * (config.data.source_length or 0)
    assert speech is not None
    drawn = torch.Generator().manual_seed(2 * seed + 1)
    return next_tokens(zipf_tokens(vocab, batch, config.data.seq_length + 1, 2 * seed)) | {
        "frames": torch.randn(batch, places, speech.filters, generator=drawn),
        "frame_documents": torch.ones(batch, places, dtype=torch.int64),
    }


@dataclass(frozen=True)
class Synthetic:
    """How samples of one kind are made without data."""

    batch: Callable[[RunConfig, int, int, int], Batch]
    """From a run with its model, a vocabulary, a number of samples and a seed to a micro-batch."""
    words: str = "synthetic tokens after Zipf's law"
    """What they are."""
    log_frequencies: Callable[[int], Tensor] = zipf_log_frequencies
    """log p of each of so many labels, float64 [v]."""
    assumed: int = 32_000
    """Labels where nothing tells their number."""
    assumed_words: str = "vocabulary of {:,} assumed"


_OF_IMAGES = Synthetic(
    _images,
    "Gaussian pixels",
    lambda classes: torch.full((classes,), -math.log(classes), dtype=torch.float64),
    assumed=1000,
    assumed_words="{:,} classes assumed",
)
SYNTHETIC: dict[SampleKind, Synthetic] = {
    "next_token": Synthetic(_next_token),
    "masked": Synthetic(_masked),
    "pairs": Synthetic(_pairs),
    "spans": Synthetic(_pairs),
    "images": _OF_IMAGES,
    "clips": Synthetic(_clips, "Gaussian frames, and synthetic tokens after Zipf's law"),
}
"""By what a task's batches are made of."""

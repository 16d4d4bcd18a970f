"""Samples for masked language modelling: of a blend, by position, with their masks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.hf.tokenizer.table import tokenizer_file
from pretrain.config.schema import Corpus
from pretrain.config.sections.masking import Masking
from pretrain.data.blend import TokenBlend, open_blend
from pretrain.data.manifest import Manifest
from pretrain.data.masked.masking import (
    Masked,
    MaskVocabulary,
    document_positions,
    mask_sample,
    places_per_sample,
    target_count,
)
from pretrain.data.masked.single import Single
from pretrain.data.order import Cut, Stream, sample_key
from pretrain.data.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class MaskedSample:
    """One sample of s tokens with k places to predict."""

    masked: Masked
    segments: np.ndarray
    """[s] int64: number of each token's document within the sample, from 1; 0 is padding."""


class MaskedBlend:
    """Masked samples of a blend. Made by `open_masked`."""

    targets_per_sample: int
    """k: places to predict of every sample. Where text is short some have the weight 0."""

    def __init__(
        self, blend: TokenBlend, settings: Masking, vocabulary: MaskVocabulary, seed: int | None
    ) -> None:
        """seed: of the masks; None: the same masks in all runs."""
        self.blend, self.settings, self.vocabulary, self.seed = blend, settings, vocabulary, seed
        self.targets_per_sample = places_per_sample(settings.rate, blend.seq_length)

    def sample(self, index: int) -> MaskedSample:
        """Returns sample `index`, a pure function of the blend, its settings, seed and index.

        Raises IndexError for a negative index, UserError for damaged data.
        """
        tokens, segments = self.blend.window(index, self.vocabulary.padding)
        key = sample_key("mask", self.seed, index)
        return MaskedSample(mask_sample(tokens, segments, self.settings, self.vocabulary, key), segments)

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """Returns the samples named, n of them. Raises as `sample`.

        tokens [n, s]: what the model sees. segments [n, s]: its documents, 0 for padding.
        positions [n, s]: of each token in its document.
        places [n, k], labels [n, k]: places to predict and what stood there.
        weights [n, k] float32: 1, or 0 where a sample has no such place. All others are int64.
        """
        samples = [self.sample(int(index)) for index in indices]
        segments = np.stack([sample.segments for sample in samples])
        masked = [sample.masked for sample in samples]
        arrays = {
            "tokens": np.stack([one.inputs for one in masked]),
            "segments": segments,
            "positions": document_positions(segments),
            "places": np.stack([one.places for one in masked]),
            "labels": np.stack([one.labels for one in masked]),
            "weights": np.stack([one.weights for one in masked]),
        }
        return {name: torch.from_numpy(rows) for name, rows in arrays.items()}

    def blank(self, count: int) -> dict[str, torch.Tensor]:
        """Returns a batch of `count` samples of the same form, without data and weights."""
        batch = {
            name: torch.zeros(count, self.blend.seq_length, dtype=torch.int64)
            for name in ("tokens", "segments", "positions")
        }
        # Of one document: a sample of padding alone would leave attention nothing to attend to.
        batch["segments"] += 1
        for name, dtype in (("places", torch.int64), ("labels", torch.int64), ("weights", torch.float32)):
            batch[name] = torch.zeros(count, self.targets_per_sample, dtype=dtype)
        return batch

    def targets(self, indices: Iterable[int]) -> int:
        """Returns how many tokens of the samples named are to be predicted: their weights' sum.

        Reads no tokens, so that every rank can count those of a whole step.
        """
        extents = (self.blend.extent(int(index)) for index in indices)
        return sum(target_count(self.settings.rate, tokens, tokens - marks) for tokens, marks in extents)


def open_masked(
    corpora: list[Corpus],
    split: str,
    seq_length: int,
    seed: int,
    cache: Path | None,
    settings: Masking,
    alone: bool = False,
) -> MaskedBlend:
    """Opens a split of one or more data sets for masked language modelling.

    Splits other than "train" have masks that no seed changes.
    The other arguments, and what is raised, are those of `open_blend`; UserError also where the
    tokenizer has no mask token.
    """
    cut: Cut = Stream(seq_length) if settings.packed else Single(seq_length, settings.long)
    blend = open_blend(corpora, split, seq_length, seed, cache, alone, cut)
    vocabulary = MaskVocabulary.of(Tokenizer(tokenizer_file(corpora[0].path)))
    return MaskedBlend(blend, settings, vocabulary, seed if split == "train" else None)


def target_entropy(manifest: Manifest) -> float | None:
    """Entropy in nats of the tokens to predict: the loss of a model that knows their frequencies.

    These are the frequencies of the train split without the marks of documents, of which each
    document has the same number.
    None for a data set that does not know its entropy, or holds no text.
    """
    entropy, facts = manifest.unigram_entropy_nats, manifest.facts("", "train")
    if entropy is None:
        return None
    share = facts.documents / facts.tokens  # of each mark among all tokens
    marks = 1 if manifest.begin_id is None else 2
    text = 1 - marks * share
    if text <= 0:
        return None
    # The entropy of all tokens is that of the choice between the marks and text, and text's part of
    # the entropy of text.
    choice = -marks * share * math.log(share) - text * math.log(text)
    return (entropy - choice) / text

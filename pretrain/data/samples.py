"""Micro-batches from a blend, by kind of samples.

A kind is one entry of `KINDS`: from the settings of a run and a split to an object that makes
batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from pretrain.config.schema import RunConfig
from pretrain.data.blend import Blend, open_blend
from pretrain.data.documents import document_parts
from pretrain.data.images.samples import Images
from pretrain.data.masked.masking import type_cut
from pretrain.data.masked.samples import MaskedBlend, open_masked, target_entropy
from pretrain.data.pairs.samples import PairBlend, open_pairs
from pretrain.data.spans.samples import SpanBlend, label_entropy, open_spans
from pretrain.data.speech.samples import open_clips
from pretrain.tasks.task import Batch, SampleKind


class Samples(Protocol):
    """Samples by number, counted over all passes over the data."""

    @property
    def blend(self) -> Blend:
        """Where their tokens come from."""

    @property
    def entropy(self) -> float | None:
        """Loss in nats of a model that only knows how often each label occurs in training."""

    def batch(self, indices: Iterable[int]) -> Batch:
        """The micro-batch of the samples named: a function of nothing else.

        Raises IndexError for a negative number, UserError for damaged data.
        """

    def blank(self, count: int) -> Batch:
        """A micro-batch of the same form without data."""

    def targets(self, indices: Iterable[int]) -> int | None:
        """How many labels of these samples count; None where all labels of all batches do.

        Reads no tokens, so that every rank can count those of a whole step.
        """


def next_tokens(tokens: Tensor) -> Batch:
    """The batch of windows [b, s + 1]: tokens [b, s] and labels [b, s], the tokens after them."""
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


class NextToken:
    """Windows whose every token but the first is a label."""

    def __init__(self, config: RunConfig, split: str, alone: bool = False) -> None:
        data, cache = config.data, Path(config.data.cache) if config.data.cache else None
        self.document_mask = data.document_mask
        self.blend = open_blend(data.corpora, split, data.seq_length, config.train.seed, cache, alone)

    @property
    def entropy(self) -> float | None:
        """As `Samples`."""
        return self.blend.manifests[0].unigram_entropy_nats

    def batch(self, indices: Iterable[int]) -> Batch:
        """As `Samples`."""
        return self._of(self.blend.batch(indices))

    def blank(self, count: int) -> Batch:
        """As `Samples`."""
        return self._of(torch.zeros(count, self.blend.seq_length + 1, dtype=torch.int64))

    def _of(self, tokens: Tensor) -> Batch:
        found = next_tokens(tokens)
        return found | document_parts(found["tokens"], self.blend.eod_id) if self.document_mask else found

    def targets(self, indices: Iterable[int]) -> int | None:
        """As `Samples`."""
        return None


class MaskedTokens:
    """Samples of which some tokens are hidden; these are the labels."""

    def __init__(self, source: MaskedBlend, model: ModelConfig) -> None:
        self.source, self.blend = source, source.blend
        self.types = model.token_types > 0

    @classmethod
    def of(cls, config: RunConfig, split: str, alone: bool = False) -> MaskedTokens:
        """Those of a run."""
        data, cache = config.data, Path(config.data.cache) if config.data.cache else None
        return cls(
            open_masked(
                data.corpora, split, data.seq_length, config.train.seed, cache, config.masking, alone
            ),
            config.model,
        )

    @property
    def entropy(self) -> float | None:
        """As `Samples`."""
        return target_entropy(self.blend.manifests[0])

    def batch(self, indices: Iterable[int]) -> Batch:
        """As `Samples`."""
        numbers = [int(index) for index in indices]
        return self._named(self.source.batch(numbers), numbers)

    def _named(self, given: Batch, numbers: Sequence[int]) -> Batch:
        names = {"tokens": "tokens", "documents": "segments", "targets": "places", "positions": "positions"}
        found = {name: given[theirs] for name, theirs in names.items()}
        found |= {"labels": given["labels"], "weights": given["weights"]}
        if self.types:
            places = torch.arange(self.blend.seq_length)
            cuts = torch.tensor([[type_cut(self.source.seed, number, len(places))] for number in numbers])
            found["token_types"] = (places >= cuts).long()
        return found

    def blank(self, count: int) -> Batch:
        """As `Samples`."""
        return self._named(self.source.blank(count), range(count))

    def targets(self, indices: Iterable[int]) -> int | None:
        """As `Samples`."""
        return self.source.targets(indices)


class Crossed:
    """Samples for an encoder and a decoder, which their blend makes whole."""

    def __init__(self, blend: PairBlend | SpanBlend, entropy: float | None, split: str) -> None:
        self.blend, self.entropy = blend, entropy
        if split == "train" and (not dist.is_initialized() or dist.get_rank() == 0):
            for line in blend.report():
                print(f"fathom: {line}", file=sys.stderr)

    def batch(self, indices: Iterable[int]) -> Batch:
        """As `Samples`."""
        return self.blend.batch(indices)

    def blank(self, count: int) -> Batch:
        """As `Samples`."""
        return self.blend.blank(count)

    def targets(self, indices: Iterable[int]) -> int | None:
        """As `Samples`."""
        return self.blend.targets(indices)


def _sides(config: RunConfig) -> tuple[int, int]:
    """Tokens of a sample's source and target side."""
    assert config.data.source_length is not None
    return config.data.source_length, config.data.seq_length


def pairs(config: RunConfig, split: str, alone: bool = False) -> Crossed:
    """Rows of pairs, whose targets are the labels."""
    data, cache = config.data, Path(config.data.cache) if config.data.cache else None
    blend = open_pairs(data.corpora, split, _sides(config), config.train.seed, cache, alone)
    return Crossed(blend, blend.manifests[0].unigram_entropy_nats, split)


def spans(config: RunConfig, split: str, alone: bool = False) -> Crossed:
    """Texts, whose hidden spans are the labels."""
    data, cache = config.data, Path(config.data.cache) if config.data.cache else None
    blend = open_spans(data.corpora, split, _sides(config), config.train.seed, cache, config.spans, alone)
    return Crossed(blend, label_entropy(blend.manifests[0], blend.counts), split)


def clips(config: RunConfig, split: str, alone: bool = False) -> Crossed:
    """Rows of clips, whose words are the labels."""
    data, speech = config.data, config.model.speech
    assert speech is not None
    cache = Path(data.cache) if data.cache else None
    given = config.train.seed, cache, config.spec_augment, alone
    blend = open_clips(data.corpora, split, _sides(config), *given)
    blend.check_filters(speech.filters)
    return Crossed(blend, blend.manifests[0].unigram_entropy_nats, split)


KINDS: dict[SampleKind, Callable[[RunConfig, str, bool], Samples]] = {
    "next_token": NextToken,
    "masked": MaskedTokens.of,
    "pairs": pairs,
    "spans": spans,
    "images": Images.of,
    "clips": clips,
}


def open_samples(config: RunConfig, kind: SampleKind, split: str, *, alone: bool = False) -> Samples:
    """Samples of a split of a run's data.

    alone: as `open_blend`, which says too what is raised.
    """
    return KINDS[kind](config, split, alone)

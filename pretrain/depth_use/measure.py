"""What a trained model loses without a layer, and how its prediction grows along the depth.

A layer or a block of layers is skipped by letting the stream pass through unchanged.
All layers before it compute what they always do, so that one walk along the layers gives their
work to every skip: a skip costs only the layers after it, about half of the model in the mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError
from model.words import duration
from pretrain.depth_use.walk import Branches, Walk

if TYPE_CHECKING:
    from pretrain.trained.scorer import Scorer

MOST_LAYERS = 100
"""Layers that are skipped one at a time unless asked for more."""
BLOCKS = 8
"""Equal blocks of layers that are skipped together."""

Batch = tuple[Tensor, int]
"""Windows [b, n + 1] of token ids, and the first target that counts."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Skip:
    """The model without some neighbouring layers."""

    first: int
    """Layer, from 1."""
    last: int
    loss: float
    """Nats per token."""
    change: float
    """Above the whole model's."""
    error: float | None
    """Standard error of the change, over windows; None for a single window."""


@dataclass(frozen=True)
class LayerUse:
    """One layer of the whole model."""

    layer: int
    """From 1."""
    attention_ratio: float
    """rms of what attention adds to the stream, over the rms of what it adds to."""
    mlp_ratio: float
    """The same of the feed-forward."""
    cosine: float
    """Between a token's vectors before and after the layer, mean."""


@dataclass(frozen=True)
class Prediction:
    """The model's end applied to the stream after a layer (logit lens)."""

    layer: int
    """0: before the first."""
    loss: float
    """Nats per token."""
    divergence: float
    """Kullback-Leibler divergence of this prediction from the final one, nats per token."""
    agreement: float
    """Share of the positions whose likeliest token is the final prediction's."""


@dataclass(frozen=True)
class Measured:
    """A model on some windows."""

    loss: float
    """Of the whole model, nats per token."""
    tokens: int
    """How many were predicted."""
    singles: tuple[Skip, ...]
    blocks: tuple[Skip, ...]
    layers: tuple[LayerUse, ...]
    predictions: tuple[Prediction, ...]
    """Of place 0, and after every layer."""


@dataclass(frozen=True)
class Plan:
    """Which stretches of layers are skipped: (layers before it, last layer of it)."""

    num_layers: int
    singles: tuple[tuple[int, int], ...]
    blocks: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, num_layers: int, every: int | None = None) -> Plan:
        """The skips of a model.

        every: of layers that are skipped alone; None: such that they are at most MOST_LAYERS.
        The last layer is always one of them.
        Raises UserError for more than there are layers.
        """
        if every is not None and every > num_layers:
            raise UserError(f"--every {every}: the model has {num_layers} layers only")
        step = every or math.ceil(num_layers / MOST_LAYERS)
        starts = sorted({*range(0, num_layers, step), num_layers - 1})
        count = min(BLOCKS, num_layers)
        edges = [round(index * num_layers / count) for index in range(count + 1)]
        return cls(
            num_layers,
            tuple((start, start + 1) for start in starts),
            tuple(pairwise(edges)),
        )

    @property
    def skips(self) -> list[tuple[int, int]]:
        """All stretches, each once."""
        return sorted({*self.singles, *self.blocks})

    @property
    def passes(self) -> float:
        """Forward passes through the layers that a batch costs."""
        return 2 + sum(self.num_layers - stop for _, stop in self.skips) / self.num_layers

    @property
    def ends(self) -> int:
        """Predictions that a batch costs."""
        return 2 + self.num_layers + len(self.skips)


@dataclass
class _Sums:
    """Sums over tokens of the batches seen so far."""

    plan: Plan
    tokens: list[int] = field(default_factory=list)
    """Of every window."""
    whole: list[float] = field(default_factory=list)
    """Summed loss of every window."""
    skipped: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """The same without a stretch of layers."""
    squares: Tensor = field(init=False)
    """[layers, 4]: attention branch, what it is added to, and the same of the feed-forward."""
    cosines: Tensor = field(init=False)
    """[layers]"""
    lens: Tensor = field(init=False)
    """[layers + 1, 3]: loss, divergence, agreement."""
    read: int = 0
    """Tokens read, of which cosines and squares are."""

    def __post_init__(self) -> None:
        n = self.plan.num_layers
        self.squares, self.cosines, self.lens = (
            torch.zeros(size, dtype=torch.float64) for size in ((n, 4), (n,), (n + 1, 3))
        )


def measure(
    scorer: Scorer,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> Measured:
    """Measures a model on windows.

    say: gets what it will cost, before the work starts.
    progress: gets (skips done, all skips).
    Raises UserError where tokens do not fit the model, or its loss is not finite.
    """
    walk, sums = Walk(scorer.model), _Sums(plan)
    say(_cost(scorer, walk, plan, batches))
    total = len(batches) * len(plan.skips)
    for done in _walks(scorer, walk, batches, sums):
        if progress:
            progress(done, total)
    return _result(sums)


@torch.no_grad()
def _cost(scorer: Scorer, walk: Walk, plan: Plan, batches: Sequence[Batch]) -> str:
    """What the measurement takes, in words. The first batch is timed.

    Raises UserError where the model's loss on it is not finite.
    """
    inputs, labels = scorer.inputs(batches[0][0])
    windows = sum(len(tokens) for tokens, _ in batches)
    _finite(scorer.losses(batches[0][0]))  # the first pass is slower than the others
    times = [time.perf_counter()]
    stream, beside = walk.enter(scorer.batch(inputs))
    stream = walk.run(stream, 0, walk.last, beside)
    float(stream.sum())  # waits for the device
    times.append(time.perf_counter())
    log_p_bsv = walk.log_probabilities(stream, walk.last)
    _lens(log_p_bsv, log_p_bsv, labels, 0)
    times.append(time.perf_counter())
    seconds = plan.passes * (times[1] - times[0]) + plan.ends * (times[2] - times[1])
    return (
        f"{len(plan.singles)} of {plan.num_layers} layers and {len(plan.blocks)} blocks are skipped in turn "
        f"on {windows} windows, as much work as {plan.passes:.0f} forward passes over them: "
        f"about {duration(seconds * windows / len(inputs))}"
    )


def _finite(losses: Tensor) -> None:
    if not losses.isfinite().all():
        raise UserError("the loss of the whole model is not finite: nothing can be said about its layers")


@torch.no_grad()
def _walks(scorer: Scorer, walk: Walk, batches: Sequence[Batch], sums: _Sums) -> Iterator[int]:
    """Adds every batch to the sums. Yields the number of skips done so far."""
    stretches, done = sums.plan.skips, 0
    for tokens, first in batches:
        inputs, labels = scorer.inputs(tokens)
        start, beside = walk.enter(scorer.batch(inputs))
        final_bsv = walk.log_probabilities(walk.run(start, 0, walk.last, beside), walk.last)
        losses = _losses(final_bsv, labels)[:, first:]
        _finite(losses)
        sums.whole += losses.double().sum(1).tolist()
        sums.tokens += [losses.shape[1]] * len(losses)
        sums.read += inputs.numel()
        stream = start
        for place in range(walk.last + 1):
            sums.lens[place] += _lens(walk.log_probabilities(stream, place), final_bsv, labels, first)
            for stretch in [one for one in stretches if one[0] == place]:
                end = walk.run(walk.skip(stream, *stretch), stretch[1], walk.last, beside)
                without = _losses(walk.log_probabilities(end, walk.last), labels)[:, first:]
                sums.skipped.setdefault(stretch, []).extend(without.double().sum(1).tolist())
                done += 1
                yield done
            if place < walk.last:
                stream = _layer(walk, place, stream, beside, sums)


def _layer(walk: Walk, place: int, stream_sbh: Tensor, beside: dict[str, Any], sums: _Sums) -> Tensor:
    """The stream after one layer, which is added to the sums."""
    with Branches(walk.layers[place]) as branches:
        after_sbh = walk.run(stream_sbh, place, place + 1, beside)
    tokens = stream_sbh.shape[0] * stream_sbh.shape[1]
    seen = torch.tensor([value for pair in branches.seen for value in pair], dtype=torch.float64)
    sums.squares[place] += seen * tokens
    sums.cosines[place] += float(
        F.cosine_similarity(stream_sbh.float(), after_sbh.float(), -1).double().sum()
    )
    return after_sbh


def _losses(log_p_bsv: Tensor, labels_bs: Tensor) -> Tensor:
    """[b, s] in nats."""
    return -log_p_bsv.gather(2, labels_bs[..., None]).squeeze(2)


def _lens(log_p_bsv: Tensor, final_bsv: Tensor, labels_bs: Tensor, first: int) -> Tensor:
    """Summed loss, divergence from the final prediction, and agreement with it, [3]."""
    divergence_bs = (final_bsv.exp() * (final_bsv - log_p_bsv)).sum(-1)
    same_bs = log_p_bsv.argmax(-1) == final_bsv.argmax(-1)
    parts = (_losses(log_p_bsv, labels_bs), divergence_bs, same_bs)
    return torch.stack([part[:, first:].double().sum() for part in parts]).cpu()


def _result(sums: _Sums) -> Measured:
    tokens = sum(sums.tokens)
    ratios = (sums.squares[:, 0::2] / sums.squares[:, 1::2]).sqrt().tolist()
    layers = zip(ratios, (sums.cosines / sums.read).tolist(), strict=True)
    return Measured(
        loss=sum(sums.whole) / tokens,
        tokens=tokens,
        singles=tuple(_skip(stretch, sums) for stretch in sums.plan.singles),
        blocks=tuple(_skip(stretch, sums) for stretch in sums.plan.blocks),
        layers=tuple(
            LayerUse(number, attention, mlp, cosine)
            for number, ((attention, mlp), cosine) in enumerate(layers, 1)
        ),
        predictions=tuple(
            Prediction(place, *values) for place, values in enumerate((sums.lens / tokens).tolist())
        ),
    )


def _skip(stretch: tuple[int, int], sums: _Sums) -> Skip:
    """A stretch's loss, and how far its change is known."""
    tokens = sum(sums.tokens)
    loss, whole = sum(sums.skipped[stretch]) / tokens, sum(sums.whole) / tokens
    changes = [without - given for without, given in zip(sums.skipped[stretch], sums.whole, strict=True)]
    return Skip(stretch[0] + 1, stretch[1], loss, loss - whole, _error(changes, sums.tokens))


def _error(changes: Sequence[float], tokens: Sequence[int]) -> float | None:
    """Standard error of sum(changes) / sum(tokens) over windows; None for a single one."""
    count = len(changes)
    if count < 2:
        return None
    mean = sum(changes) / sum(tokens)
    squares = sum((change - mean * n) ** 2 for change, n in zip(changes, tokens, strict=True))
    return math.sqrt(squares * count / (count - 1)) / sum(tokens)

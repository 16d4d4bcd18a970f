"""What a model has to know of recordings: mean and variance of each filter, and what convolutions
with random weights make of them.

A layer with many channels and random weights sees of its input only the products of places,
K_ij = x_i . x_j / entries. A convolution takes the mean of K over its window; a gate, of
pre-activations u and v of such products, gives u sigmoid(v), whose products are
K_ij E[sigmoid(v_i) sigmoid(v_j)]. With sigmoid(x) ~ Phi(x sqrt(pi / 8)) that mean is
1/4 + arcsin(c) / (2 pi), c the correlation of the normal variables behind (derived; 0.7 % above the
sigmoid's at unit variance).
"""

from __future__ import annotations

import math

import numpy as np

from model.speech import KERNEL, NO_DATA, FrameMoments, tokens_of
from pretrain.data.speech.filterbanks import Array
from pretrain.data.sums import Sums

MEASURED_CLIPS, MEASURED_FRAMES = 128, 800
"""Clips of which moments are measured, spread over the training split, and frames of each."""
CLOSE = math.pi / 8
"""Variance of the normal variable whose distribution is next to the sigmoid."""


class FrameSums(Sums):
    """Over the frames of a training split, of each filter."""

    def add(self, frames: np.ndarray) -> None:
        """frames: [frames, filters]."""
        self.sums += frames.sum(0, dtype=np.float64)
        self.squares += np.square(frames, dtype=np.float64).sum(0)
        self.count += len(frames)


def _subsampled(products: Array) -> Array:
    """Of every second window of `KERNEL` places, with zeros around: the mean of their products."""
    count = -(-len(products) // 2)
    padded = np.pad(products, KERNEL // 2)
    return np.asarray(
        sum(padded[o : o + 2 * count : 2, o : o + 2 * count : 2][:count, :count] for o in range(KERNEL))
        / KERNEL
    )


def _gated(products: Array) -> Array:
    spread = np.sqrt(1 + CLOSE * np.diag(products))
    inside = np.clip(CLOSE * products / np.outer(spread, spread), -1, 1)
    return np.asarray(products * (0.25 + np.arcsin(inside) / (2 * math.pi)))


def frame_moments(clips: list[np.ndarray]) -> FrameMoments:
    """What two gated convolutions make of standardised clips, [frames, filters] each.

    Clips that are too short for two tokens say nothing; without others it is what `NO_DATA` says.
    """
    grams = [clip @ clip.T / clip.shape[1] for clip in clips if tokens_of(len(clip)) > 1]
    if not grams:
        return NO_DATA
    first, entering = _to_unit([_subsampled(gram.astype(np.float64)) for gram in grams])
    second, middle = _to_unit([_subsampled(_gated(one)) for one in first])
    leaving = [_gated(one) for one in second]
    own = sum(float(np.trace(one)) for one in leaving)
    shared = sum(float(one.sum()) for one in leaving) - own
    tokens, pairs = sum(map(len, leaving)), sum(len(one) * (len(one) - 1) for one in leaving)
    return FrameMoments(
        entering=entering,
        middle=middle,
        leaving=own / tokens,
        correlation=min(max(shared / pairs / (own / tokens), 0.0), 0.999),
    )


def _to_unit(products: list[Array]) -> tuple[list[Array], float]:
    """Products over the mean square of all places, and that mean square."""
    mean = sum(float(np.trace(one)) for one in products) / sum(map(len, products))
    return [one / mean for one in products], mean

"""DeepScaleLM's weight variances: the token-correlation recursion.

As published, and for a causal decoder of finite length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.depth.sublayer import Layer
from model.theory.correlation import correlation_map, second_moment
from model.theory.step import Branch, BranchLaw, Stream, sublayer_step


@dataclass(frozen=True)
class AttentionMoments:
    """One attention output entry, for values of unit variance.

    Late positions are those of the second half of the sequence.
    """

    second: float
    """Second moment, mean over all positions."""
    covariance: float
    """Between two tokens."""
    late: float
    """Second moment at late positions."""
    late_value: float = 0.0
    """Backward gain at late positions, through being read as a value or key."""
    late_query: float = 0.0
    """Backward gain at late positions, through the token's own query."""


# (token correlation, variance of the attention scores) -> moments of the output
AttentionLaw = Callable[[float, float], AttentionMoments]


def published_attention(correlation: float, score_variance: float) -> AttentionMoments:
    """Long-sequence limit (Kedia et al. 2024).

    Every output is the mean of all values, so both moments are r.
    """
    return AttentionMoments(correlation, correlation, correlation)


def bidirectional_attention(length: int, p: float) -> AttentionLaw:
    """Unmasked attention over `length` tokens, dropout p on the probabilities.

    Derived; the terms of order 1/length of Kedia et al. 2024 for one head.
    """

    def law(correlation: float, score_variance: float) -> AttentionMoments:
        r = correlation
        second = r + (1 - r) * min(1.0, math.exp(min(700.0, (1 - r) * score_variance)) / length) / (1 - p)
        return AttentionMoments(second, r + (1 - r) / length, second)

    return law


def cross_attention(length: int, source_correlation: float, p: float) -> AttentionLaw:
    """Attention to `length` tokens of another stack, dropout p on the probabilities (derived).

    Its values have token correlation r_s = source_correlation, whatever the queries' is; that,
    r, which the law takes, decides how alike two rows of scores are.
      second = r_s + (1 - r_s) min(1, e^((1 - r_s) W) / length) / (1 - p)
      covariance = r_s + (1 - r_s) min(1, e^((1 - r_s) r W) / length)
    A token's gradient reaches it through its query alone.
    """

    def peak(scores: float) -> float:
        return min(1.0, math.exp(min(700.0, (1 - source_correlation) * scores)) / length)

    def law(correlation: float, score_variance: float) -> AttentionMoments:
        r = source_correlation
        own = peak(score_variance) / (1 - p)
        second = r + (1 - r) * own
        covariance = r + (1 - r) * peak(correlation * score_variance)
        query = (1 - r) ** 2 * score_variance * own
        return AttentionMoments(second, covariance, second, late_query=query)

    return law


def causal_attention(length: int, p: float) -> AttentionLaw:
    """Causal attention over `length` tokens, dropout p on the probabilities (derived).

    Query i averages i values. Its sum of squared probabilities is about
      S_i = min(1, e^((1 - r) W) / i) / (1 - p),
    W the score variance, and two queries share 1 / max(i, j).
    With L = length, H_L its harmonic number:
      second = r + (1 - r) mean_i S_i
      covariance = r + (1 - r) 2 (L - H_L) / (L (L - 1))
    Late positions, with independent token gradients: key i is read by queries j >= i with sum of
    squares T_i = e^((1 - r) W) / (1 - p) sum_j 1/j^2,
      late_value = (1 + (1 - r)^2 W) mean_late T_i
      late_query = (1 - r)^2 W mean_late S_i
    (the first through values and keys; both are lower bounds where token gradients are correlated).
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, length + 1, dtype=np.float64))])
    shared = float(2 * (length - harmonic[length]) / (length * (length - 1))) if length > 1 else 1.0
    first_late = length // 2
    # mean over late keys i of the sum over queries j >= i of 1 / j^2
    late = np.arange(first_late + 1, length + 1, dtype=np.float64)
    reads = float(np.mean(np.cumsum(late[::-1] ** -2.0)))

    def mean_of_squares(start: int, peak: float) -> float:
        """Mean of min(1, peak / i) over i = start + 1 .. length."""
        saturated = max(start, int(min(length, peak)))
        return float((saturated - start + peak * (harmonic[length] - harmonic[saturated])) / (length - start))

    def law(correlation: float, score_variance: float) -> AttentionMoments:
        r = correlation
        peak = math.exp(min(700.0, (1 - r) * score_variance))
        own, own_late = mean_of_squares(0, peak) / (1 - p), mean_of_squares(first_late, peak) / (1 - p)
        read = min(peak, length) * reads / (1 - p)
        scores = (1 - r) ** 2 * score_variance
        return AttentionMoments(
            r + (1 - r) * own,
            r + (1 - r) * shared,
            r + (1 - r) * own_late,
            (1 + scores) * read,
            scores * own_late,
        )

    return law


@dataclass(frozen=True)
class Sizes:
    """Widths of a layer."""

    hidden: int
    """Of the stream."""
    inner: int
    """Of all query heads together."""
    ffn: int
    """Of the feed-forward, one of gate and up."""
    activation: str
    """By name."""
    centred: bool = True
    """Norms take the mean away."""


@dataclass(frozen=True)
class PlannedLayer:
    """Weight variances of one layer, and the token correlation it reads."""

    token_correlation: float
    """Of the stream where the attention sublayer reads it."""
    qk: float
    v: float
    o: float
    fc1: float
    fc2: float
    left: float = 0.0
    """Token correlation of the stream after the layer."""
    cross: float | None = None
    """Of cross-attention's values and outputs; its queries and keys are as qk."""


def feed_forward_variances(sizes: Sizes, p: float) -> tuple[float, float]:
    """(fc1, fc2) weight variances that give the branch unit variance after dropout p.

    They hold for unit-variance input.
    ReLU is homogeneous, so only the product counts and both matrices share it equally (Kedia et
    al. 2024): w = sqrt(2 (1 - p) / (hidden ffn)), which is sqrt((1 - p) / 2) / hidden at
    ffn = 4 hidden.
    Every other activation gets unit-variance pre-activations, w1 = 1 / hidden,
    and w2 = (1 - p) / (ffn E[hidden entry^2]) (derived).
    """
    if sizes.activation == "relu":
        equal = math.sqrt((1 - p) / (sizes.hidden * sizes.ffn * second_moment("relu")))
        return equal, equal
    return 1 / sizes.hidden, (1 - p) / (sizes.ffn * second_moment(sizes.activation))


def deepscale_plan(
    layers: Sequence[Layer],
    sizes: Sizes,
    correlation: float,
    p: float,
    attention: AttentionLaw,
    cross: AttentionLaw | None = None,
) -> list[PlannedLayer]:
    """Weight variances of every layer (Kedia et al. 2024; with `causal_attention`, derived).

    correlation: token correlation r0 of the embedding before dropout.
    p: dropout after the embedding and after every branch.
    Values and outputs: w_v = w_o = sqrt((1 - p) / m2) / sqrt(hidden inner), with m2 the attention
    law's second moment at the correlation that reaches the layer (m2 = r as published).
    Queries and keys: 1 / hidden, unit score variance.
    Both branches then have unit variance,
    and with residual_scale^2 + branch_scale^2 = 1 so has the stream.
    cross: law of cross-attention, where the layers have it (derived). It is treated as
    self-attention is, so that its weights are the same in every layer. Where a layer leaves it out
    of the algebra (squares of residual and branch not 1), its weights are plain ones, 1 / hidden.
    Norms, residual factors and skips mix correlations as `step.sublayer_step` has them.
    Plans for pre-norm and post-norm are the same: norms keep correlation.
    Raises ValueError for zero correlation under `published_attention`,
    whose weights would be infinite.
    """
    fc1, fc2 = feed_forward_variances(sizes, p)
    stream = Stream(1.0, correlation * (1 - p), 1.0)
    if attention(stream.correlation, 1.0).second <= 0:
        raise ValueError(
            f"token correlation {correlation} leaves the published attention gain without a finite weight: "
            "it must be positive"
        )

    def unit_branch(own: float) -> BranchLaw:
        """A branch of variance 1 after dropout, and of correlation `own` before it."""
        return lambda u: Branch(Stream(1 - p, (1 - p) * own, 1 - p), 0.0)

    planned = []
    for layer in layers:
        r = stream.correlation
        out = attention(r, 1.0)
        value = math.sqrt((1 - p) / (out.second * sizes.hidden * sizes.inner))
        after = sublayer_step(
            stream, stream, 1.0, layer.attention, unit_branch(out.covariance / out.second), p
        )
        crossed = None
        if cross is not None:
            seen = cross(after.stream.correlation, 1.0)
            crossed = math.sqrt((1 - p) / (seen.second * sizes.hidden * sizes.inner))
            law = unit_branch(seen.covariance / seen.second)
            if not math.isclose(layer.cross.residual_scale**2 + layer.cross.branch_scale**2, 1):
                crossed = 1 / sizes.hidden
                law = _ordinary_branch(seen, sizes.inner / sizes.hidden)
            after = sublayer_step(after.stream, stream, after.layer_share, layer.cross, law, p)
        own = correlation_map(sizes.activation, after.stream.correlation)
        stream = sublayer_step(after.stream, stream, after.layer_share, layer.mlp, unit_branch(own), p).stream
        planned.append(PlannedLayer(r, 1 / sizes.hidden, value, value, fc1, fc2, stream.correlation, crossed))
    return planned


def _ordinary_branch(seen: AttentionMoments, gain: float) -> BranchLaw:
    """Cross-attention whose weights have variance 1 / hidden."""
    out = Stream(seen.second, seen.covariance, seen.late).times(gain)
    return lambda u: Branch(out, 0.0)

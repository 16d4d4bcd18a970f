"""Signal propagation through a stack under any depth scheme.

Variance and token correlation go upwards, late-token gradient downwards.
Mean-field theory at initialisation (derived; the tests compare it with simulation):
a branch is independent of the stream it reads, so only identity paths add coherently.
It needs the scheme's plan (`model/depth/schemes.py`) and the weight variances, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from model.depth.scheme import WeightRole
from model.depth.sublayer import Layer, Sublayer
from model.theory.correlation import product_moment, second_moment, slope_moment
from model.theory.recursion import AttentionLaw, Sizes
from model.theory.step import Branch, Step, Stream, sublayer_step

# Variance of one weight, by role.
WeightVariances = Mapping[WeightRole, float]


def attention_branch(
    u: Stream,
    weights: WeightVariances,
    sizes: Sizes,
    attention: AttentionLaw,
    plan: Sublayer = Sublayer(),  # noqa: B008 - frozen
) -> Branch:
    """Attention block on input u (derived).

    plan: whether q, k, v and what enters the output projection are normed, to unit variance.
    Gradients through a norm are divided by what it divides; those along it are one in a head's
    width and are neglected.
    """
    q, k, v = (
        1.0 if role in plan.inner else sizes.hidden * weights[role] * u.variance for role in ("q", "k", "v")
    )
    out = attention(u.correlation, q * k)
    context = Stream(out.second, out.covariance, out.late).times(v)
    gain = sizes.inner * weights["o"]
    backward = gain * v / (u.variance or 1.0) * (out.late_value + out.late_query)
    if plan.norm_last and context.late:
        # Each token is divided by its own size, which falls with its position.
        # Between the mean of all and that of late ones lies what a pair's are like.
        size = math.sqrt(context.variance * context.late)
        normed = Stream(1.0, min(1.0, context.covariance / size), 1.0)
    else:
        normed = context
    return Branch(
        normed.times(gain),
        backward / context.late if plan.norm_last and context.late else backward,
    )


@dataclass(frozen=True)
class Source:
    """What cross-attention reads: the output of another stack."""

    stream: Stream
    attention: AttentionLaw
    """Of the queries' correlation, as `recursion.cross_attention`."""


def cross_branch(u: Stream, weights: WeightVariances, sizes: Sizes, source: Source) -> Branch:
    """Cross-attention of input u (derived). What it sends down to the source is not in it."""
    given = source.stream.variance
    key, value = (sizes.hidden * weights[role] * given for role in ("ck", "cv"))
    out = source.attention(u.correlation, sizes.hidden * weights["cq"] * u.variance * key)
    gain = sizes.inner * weights["co"] * value
    moments = Stream(out.second, out.covariance, out.late).times(gain)
    return Branch(moments, gain / (u.variance or 1.0) * out.late_query)


def feed_forward_branch(
    u: Stream,
    weights: WeightVariances,
    sizes: Sizes,
    plan: Sublayer = Sublayer(),  # noqa: B008 - frozen
) -> Branch:
    """Feed-forward block on input u: Kedia et al. 2024 for ReLU, derived for the others.

    plan: whether the hidden layer is normed. A LayerNorm takes away what all tokens share.
    """
    pre, pre_late = (sizes.hidden * weights["fc1"] * variance for variance in (u.variance, u.late))
    output = Stream(
        second_moment(sizes.activation, pre),
        product_moment(sizes.activation, pre, u.correlation),
        second_moment(sizes.activation, pre_late),
    )
    backward = (
        sizes.hidden * weights["fc2"] * sizes.ffn * weights["fc1"] * slope_moment(sizes.activation, pre_late)
    )
    if plan.norm_last:
        shared, shared_late = (
            product_moment(sizes.activation, one, 0.0) if sizes.centred else 0.0 for one in (pre, pre_late)
        )
        output = Stream(output.variance - shared, output.covariance - shared, output.late - shared_late)
        backward /= output.late or 1.0
    return Branch(output.normed(plan.norm_last).times(sizes.ffn * weights["fc2"]), backward)


def backward_factor(steps: Sequence[Step]) -> float:
    """Gradient variance at a layer's input over that at its output.

    steps: the layer's sublayers in forward order.
    The gradient is a coherent multiple of the incoming one, through identity paths,
    plus independent parts from the branches.
    Gives exactly `laws.post_ln_factor`, `laws.b2t_factor` and `laws.spannorm_factor` for those
    schemes.
    """
    amplitude, independent, skipped = 1.0, 0.0, 0.0
    for step in reversed(steps):
        amplitude, independent = amplitude * math.sqrt(step.norm), independent * step.norm
        skipped += step.skip * amplitude
        total = amplitude**2 + independent
        amplitude, independent = (
            amplitude * step.residual,
            independent * step.residual**2 + total * step.branch_gain,
        )
    return (amplitude + skipped) ** 2 + independent


@dataclass(frozen=True)
class LayerSignal:
    """Predicted signal of one layer at initialisation."""

    layer: int
    """Number from 1, in its stack."""
    forward_variance: float
    """Of the stream after the layer."""
    token_correlation: float
    """Of the stream after the layer."""
    grad_variance_late: float
    """Variance of the loss gradient at the stream ENTERING the layer, late positions only.

    Relative to that of the last layer (so 1 there).
    """
    attention_variance: float
    """Variance that the branch adds to the stream, dropout and scale included."""
    mlp_variance: float
    """Variance that the branch adds to the stream, dropout and scale included."""
    cross_variance: float | None = None
    """The same of cross-attention; None without."""
    cross_ratio: float | None = None
    """Size of what cross-attention adds over that of what it is added to; None without."""


def propagate(
    plan: Sequence[Layer],
    weights: Sequence[WeightVariances],
    sizes: Sizes,
    start: Stream,
    *,
    attention: AttentionLaw,
    p: float = 0.0,
    source: Source | None = None,
) -> list[LayerSignal]:
    """Signals of all layers of a stack, first to last.

    start: the stream entering layer 1; p: dropout on every branch.
    source: where the layers have cross-attention.
    """
    stream, signals, factors = start, [], []
    for number, (layer, weight) in enumerate(zip(plan, weights, strict=True), start=1):
        attend = partial(
            attention_branch,
            weights=weight,
            sizes=sizes,
            attention=attention,
            plan=layer.attention,
        )
        feed_forward = partial(feed_forward_branch, weights=weight, sizes=sizes, plan=layer.mlp)
        branches = [(layer.attention, attend), (layer.mlp, feed_forward)]
        if source is not None:
            crossed = partial(cross_branch, weights=weight, sizes=sizes, source=source)
            branches.insert(1, (layer.cross, crossed))
        steps: list[Step] = []
        x, share = stream, 1.0
        for sublayer, branch in branches:
            steps.append(sublayer_step(x, stream, share, sublayer, branch, p))
            x, share = steps[-1].stream, steps[-1].layer_share
        stream = x
        factors.append(backward_factor(steps))
        signals.append((number, stream, steps))
    gradients = [1.0]
    for factor in reversed(factors[:-1]):
        gradients.append(gradients[-1] * factor)
    gradients.reverse()
    return [
        LayerSignal(
            number,
            after.variance,
            after.correlation,
            gradient,
            passed[0].added,
            passed[-1].added,
            None if source is None else passed[1].added,
            None if source is None or not passed[1].kept else math.sqrt(passed[1].added / passed[1].kept),
        )
        for (number, after, passed), gradient in zip(signals, gradients, strict=True)
    ]

"""Signal propagation through a stack under any depth scheme.

Variance and token correlation go upwards, late-token gradient downwards.
Mean-field theory at initialisation (derived; the tests compare it with simulation):
a branch is independent of the stream it reads, so only identity paths add coherently.
It needs the scheme's plan (`model/depth/scheme.py`) and the weight variances, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from model.depth.scheme import Layer, Sublayer, WeightRole
from model.theory.correlation import product_moment, second_moment, slope_moment
from model.theory.recursion import AttentionLaw, Sizes

# Variance of one weight, by role.
WeightVariances = Mapping[WeightRole, float]


@dataclass(frozen=True)
class Stream:
    """Entrywise second moments."""

    variance: float
    """Of one token's vector."""
    covariance: float
    """Between two tokens."""
    late: float
    """The variance at late positions, the second half of the sequence.

    Under a causal mask these average more values and so gain less from attention.
    """

    @property
    def correlation(self) -> float:
        """Token correlation; 0 for a stream of zeros."""
        return self.covariance / self.variance if self.variance else 0.0

    def times(self, gain: float) -> Stream:
        """Moments of the stream multiplied by sqrt(gain)."""
        return Stream(self.variance * gain, self.covariance * gain, self.late * gain)

    def plus(self, other: Stream) -> Stream:
        """Moments of the sum with an independent stream."""
        return Stream(
            self.variance + other.variance, self.covariance + other.covariance, self.late + other.late
        )

    def normed(self, apply: bool = True) -> Stream:
        """Moments after a norm, which divides every token by its own size.

        It leaves a stream of zeros alone.
        """
        return Stream(1.0, self.correlation, 1.0) if apply and self.variance else self

    def dropped(self, p: float) -> Stream:
        """Moments after dropout.

        It raises a token's variance and leaves the covariance between tokens.
        """
        return Stream(self.variance / (1 - p), self.covariance, self.late / (1 - p))


@dataclass(frozen=True)
class Branch:
    """What a sublayer's function F does to moments, forward and backward."""

    output: Stream
    """Moments of what F gives."""
    backward: float
    """Gain at late positions: gradient variance at F's input over that at its output."""


BranchLaw = Callable[[Stream], Branch]


def attention_branch(u: Stream, weights: WeightVariances, sizes: Sizes, attention: AttentionLaw) -> Branch:
    """Attention block on input u (derived)."""
    gain = sizes.hidden * weights["v"] * sizes.inner * weights["o"]
    score_variance = sizes.hidden**2 * weights["q"] * weights["k"] * u.variance**2
    out = attention(u.correlation, score_variance)
    return Branch(
        Stream(out.second, out.covariance, out.late).times(gain * u.variance),
        gain * (out.late_value + out.late_query),
    )


def feed_forward_branch(u: Stream, weights: WeightVariances, sizes: Sizes) -> Branch:
    """Feed-forward block on input u: Kedia et al. 2024 for ReLU, derived for the others."""
    pre, pre_late = (sizes.hidden * weights["fc1"] * variance for variance in (u.variance, u.late))
    output = Stream(
        second_moment(sizes.activation, pre),
        product_moment(sizes.activation, pre, u.correlation),
        second_moment(sizes.activation, pre_late),
    )
    backward = (
        sizes.hidden * weights["fc2"] * sizes.ffn * weights["fc1"] * slope_moment(sizes.activation, pre_late)
    )
    return Branch(output.times(sizes.ffn * weights["fc2"]), backward)


@dataclass(frozen=True)
class Step:
    """One sublayer on moments, for late positions where the backward pass needs it."""

    stream: Stream
    """After the sublayer."""
    layer_share: float
    """Amplitude of the layer's input in the stream after the sublayer."""
    added: float
    """Variance that the branch adds to the sum."""
    residual: float
    """Amplitude of the sublayer's input in the sum."""
    skip: float
    """Amplitude of the layer's input in the sum."""
    branch_gain: float
    """Gradient variance that the branch hands to the sublayer's input, over that at the sum."""
    norm: float
    """Factor of norm_out on variances."""


def _inverse(variance: float, apply: bool) -> float:
    return 1 / variance if apply and variance else 1.0


def sublayer_step(
    x: Stream, layer_input: Stream, layer_share: float, plan: Sublayer, law: BranchLaw, p: float
) -> Step:
    """The sublayer equation of `model/depth/scheme.py` on moments.

    layer_share: amplitude of the layer's input in x.
    p: dropout on the branch.
    """
    entered = x.normed(plan.norm_in)
    branch = law(entered.times(plan.input_scale**2))
    added = branch.output.normed(plan.norm_branch).times(plan.branch_scale**2).dropped(p)
    kept = (entered if plan.residual_from_norm else x).times(plan.residual_scale**2)
    norm_in = _inverse(x.late, plan.norm_in)
    residual = plan.residual_scale * (math.sqrt(norm_in) if plan.residual_from_norm else 1.0)
    # (residual x + skip x_layer)^2, with x = layer_share x_layer + something independent.
    coherent = plan.skip_scale**2 + 2 * plan.skip_scale * residual * layer_share
    total = kept.plus(layer_input.times(coherent)).plus(added)
    norm = _inverse(total.late, plan.norm_out)
    gain = plan.branch_scale**2 * _inverse(branch.output.late, plan.norm_branch) / (1 - p)
    return Step(
        stream=total.normed(plan.norm_out),
        layer_share=(residual * layer_share + plan.skip_scale) * math.sqrt(norm),
        added=added.variance,
        residual=residual,
        skip=plan.skip_scale,
        branch_gain=gain * branch.backward * plan.input_scale**2 * norm_in,
        norm=norm,
    )


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
    """Number from 1."""
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


def propagate(
    plan: Sequence[Layer],
    weights: Sequence[WeightVariances],
    sizes: Sizes,
    start: Stream,
    *,
    attention: AttentionLaw,
    p: float = 0.0,
) -> list[LayerSignal]:
    """Signals of all layers, first to last.

    start: the stream entering layer 1; p: dropout on every branch.
    """
    stream, signals, factors = start, [], []
    for number, (layer, weight) in enumerate(zip(plan, weights, strict=True), start=1):
        attend = partial(attention_branch, weights=weight, sizes=sizes, attention=attention)
        attended = sublayer_step(stream, stream, 1.0, layer.attention, attend, p)
        after = sublayer_step(
            attended.stream,
            stream,
            attended.layer_share,
            layer.mlp,
            partial(feed_forward_branch, weights=weight, sizes=sizes),
            p,
        )
        stream = after.stream
        factors.append(backward_factor((attended, after)))
        signals.append((number, stream, attended.added, after.added))
    gradients = [1.0]
    for factor in reversed(factors[:-1]):
        gradients.append(gradients[-1] * factor)
    gradients.reverse()
    return [
        LayerSignal(n, s.variance, s.correlation, g, a, f)
        for (n, s, a, f), g in zip(signals, gradients, strict=True)
    ]

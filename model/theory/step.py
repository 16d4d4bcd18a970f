"""One sublayer of any depth scheme on moments: variance, token correlation, late positions.

Mean-field theory (derived): a branch is independent of the stream it reads, so only identity paths
add coherently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from model.depth.sublayer import Sublayer


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


@dataclass(frozen=True)
class Step:
    """One sublayer on moments, for late positions where the backward pass needs it."""

    stream: Stream
    """After the sublayer."""
    layer_share: float
    """Amplitude of the layer's input in the stream after the sublayer."""
    added: float
    """Variance that the branch adds to the sum."""
    kept: float
    """Variance of what the branch is added to."""
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
    base = kept.plus(layer_input.times(coherent))
    total = base.plus(added)
    norm = _inverse(total.late, plan.norm_out)
    gain = plan.branch_scale**2 * _inverse(branch.output.late, plan.norm_branch) / (1 - p)
    return Step(
        stream=total.normed(plan.norm_out),
        layer_share=(residual * layer_share + plan.skip_scale) * math.sqrt(norm),
        added=added.variance,
        kept=base.variance,
        residual=residual,
        skip=plan.skip_scale,
        branch_gain=gain * branch.backward * plan.input_scale**2 * norm_in,
        norm=norm,
    )

"""How much of what differs between tokens a stack still passes on when it has learned a constant.

Token frequencies are the first thing to learn, and need one vector that all tokens share. Branches
supply it together: each adds a vector along the one that the stream already has. Say that a branch
of size r (root mean square over that of what it is added to) lies along that vector m. The sum is
(1 + r) m plus d, where d is the little that differs between tokens. Then (derived)

    Norm(m (1 + r) + d) = m / |m| + d / (|m| (1 + r)) + O(d^2)    for d orthogonal to m:

d, and with it the gradient, which goes through the same factor, is divided by 1 + r. With a norm
in the stream after every sublayer, the gradient entering layer 1 over that leaving layer N is

    prod over sublayers 1 / (1 + r),

exponential in the sum of the ratios. A pre-norm keeps d in the stream and its last norm divides
once, for all layers alike: no factor. Every form between follows from `Sublayer`: d passes by
identity paths only, and each norm in the stream divides it by the size of what it norms.
Where a norm's bias makes part of its output, only the part made by its gain carries d.
`docs/theory.md` has the derivation in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from model.depth.sublayer import Layer, Sublayer


@dataclass(frozen=True)
class Passage:
    """How the stream passed one sublayer, in ratios of root mean squares."""

    growth: float = 1.0
    """Size of the residual sum over the size of what the branch is added to.

    1 + r for a branch along the stream, sqrt(1 + r^2) for one independent of it.
    """
    gain_in: float = 1.0
    """rms(gain) over rms(output) of Norm_in: below 1 where its bias adds a vector of its own."""
    gain_out: float = 1.0
    """The same of Norm_out."""


@dataclass(frozen=True)
class LayerPassage:
    """How the stream passed the sublayers of one layer."""

    attention: Passage
    mlp: Passage
    cross: Passage | None = None
    """None in a layer without cross-attention."""


def along_common(attention: float, mlp: float) -> LayerPassage:
    """A layer whose branches have these sizes, over what they are added to, and lie along it."""
    return LayerPassage(Passage(1 + attention), Passage(1 + mlp))


@dataclass(frozen=True)
class _Carried:
    """The stream at one place of a layer."""

    difference: float
    """What is left of a difference between tokens that entered the layer, as a factor."""
    size: float
    """Of the stream. What a norm gives has size 1."""


def _pass(x: _Carried, entered: float, plan: Sublayer, passage: Passage) -> _Carried:
    """The sublayer equation of `model/depth/scheme.py` on a stream along one vector.

    entered: size of the layer's input.
    """
    kept = x
    if plan.residual_from_norm:
        kept = _Carried(x.difference * passage.gain_in / x.size, 1.0)
    difference = plan.residual_scale * kept.difference + plan.skip_scale
    size = (plan.residual_scale * kept.size + plan.skip_scale * entered) * passage.growth
    return (
        _Carried(difference * passage.gain_out / size, 1.0) if plan.norm_out else _Carried(difference, size)
    )


def log_factors(plan: Sequence[Layer], passages: Sequence[LayerPassage]) -> list[float]:
    """ln of the gradient entering each layer over that leaving it, by identity paths (derived).

    plan, passages: of consecutive layers, from the first one of a stack on.
    The stream that enters them has size 1: what it really has is no part of forgetting.
    -inf for a layer without identity path, nan where a ratio is not finite.
    """
    factors, size = [], 1.0
    for layer, passage in zip(plan, passages, strict=True):
        x = _pass(_Carried(1.0, size), size, layer.attention, passage.attention)
        if passage.cross is not None:
            x = _pass(x, size, layer.cross, passage.cross)
        x = _pass(x, size, layer.mlp, passage.mlp)
        factors.append(_log(x.difference))
        size = x.size
    return factors


def log_gradients(plan: Sequence[Layer], passages: Sequence[LayerPassage]) -> list[float]:
    """ln of the gradient entering each layer over that leaving the last one.

    The first number is of the whole stack. Arguments as in `log_factors`.
    """
    return list(accumulate(reversed(log_factors(plan, passages))))[::-1]


def _log(value: float) -> float:
    if not math.isfinite(value):
        return math.nan
    return math.log(value) if value > 0 else -math.inf

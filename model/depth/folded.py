"""The depth plan as it is computed: in units of the stream in which no residual is multiplied.

A scheme may multiply its residual by a constant (`model/depth/schemes.py`).
DeepScaleLM's is sqrt(1 - 1/N) at N layers, and from 256 layers on that is so near 1 that a product
in bfloat16 gives x back for every x: the constant is lost, forward and backward.
So the stream is computed in units that change along the depth.
With x = c y, c a Python float for each place of the stream and y what the tensors hold,
one sublayer

    x' = r x + b F(s Norm(x)) + k x_layer

becomes, divided by the unit c' = r c of the stream after it,

    y' = y + (b / c') F(s Norm(y)) + (k c_layer / c') y_layer.

A norm sees the unit of its input in its epsilon only: Norm_e(c y) = Norm_{e / c^2}(y). So

    pre-norm    y' = y + (b / c') F(s Norm_{e / c^2}(y)),    c' = r c
    post-norm   x' = Norm_{e / r^2}(x + (b / r) F(s x)),     in units of 1 again

and every other form is a mixture of the two (derived). Weights, their names and their gradients are
those of the scheme's own equation; what is looked at inside the stack has to be multiplied by its
unit. A scheme without residual constants has units of 1 everywhere and is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.depth.sublayer import Layer, Sublayer

RANGE = 2.0**16
"""Units stay within 1 / RANGE and RANGE: beyond, the residual is multiplied by a power of two.

That product is exact in every format. With default options no scheme comes near.
"""


@dataclass(frozen=True)
class FoldedSublayer(Sublayer):
    """A sublayer whose coefficients are in computed units.

    `residual_scale` is 1, or 0 where the scheme's is, but for the powers of two of `RANGE` and a
    sign.
    """

    entering: float = 1.0
    """Unit of the stream that enters."""
    joined: float = 1.0
    """Unit of the residual sum, before a norm after it."""

    @property
    def leaving(self) -> float:
        """Unit of the stream that leaves."""
        return 1.0 if self.norm_out else self.joined

    @property
    def adds_product(self) -> bool:
        """Whether the join adds a multiple of the branch's last product to the plain residual."""
        return self.residual_scale == 1.0 and self.skip_scale == 0.0 and not self.norm_branch

    def epsilon_in(self, epsilon: float) -> float:
        """Epsilon of the norm before the branch, from the model's."""
        return epsilon / self.entering**2

    def epsilon_out(self, epsilon: float) -> float:
        """Epsilon of the norm after the residual sum, from the model's."""
        return epsilon / self.joined**2


@dataclass(frozen=True)
class FoldedLayer:
    """The sublayers of one layer in computed units. `cross` as in `Layer`."""

    attention: FoldedSublayer
    mlp: FoldedSublayer
    cross: FoldedSublayer = field(default_factory=FoldedSublayer)
    gate: bool = False
    """As in `Layer`; a factor does not see units."""

    @property
    def entering(self) -> float:
        """Unit of the stream that enters the layer."""
        return self.attention.entering

    @property
    def leaving(self) -> float:
        """Unit of the stream that leaves the layer."""
        return self.mlp.leaving


def folded(plan: Sequence[Layer], *, cross: bool = False) -> tuple[FoldedLayer, ...]:
    """A stack's plan in computed units. The stream that enters it is in units of 1.

    plan: of ALL layers of the stack, also for one stage of a pipeline: units are products from the
    first layer on. cross: the layers have cross-attention.
    """
    unit, layers = 1.0, []
    for layer in plan:
        given, parts = unit, {}
        for name in ("attention", "cross", "mlp") if cross else ("attention", "mlp"):
            parts[name] = _sublayer(getattr(layer, name), unit, given)
            unit = parts[name].leaving
        layers.append(FoldedLayer(**parts, gate=layer.gate))
    return tuple(layers)


def _sublayer(plan: Sublayer, unit: float, given: float) -> FoldedSublayer:
    """One sublayer, entered by a stream in `unit` in a layer entered in `given`."""
    residual = plan.residual_scale * (1.0 if plan.residual_from_norm else unit)
    skip = plan.skip_scale * given
    # The first of these that is there gets the factor 1.
    joined = next((abs(part) for part in (residual, skip, plan.branch_scale) if part != 0), 1.0)
    while joined < 1 / RANGE:
        joined *= RANGE
    while joined > RANGE:
        joined /= RANGE
    return FoldedSublayer(
        norm_in=plan.norm_in,
        norm_branch=plan.norm_branch,
        norm_out=plan.norm_out,
        residual_from_norm=plan.residual_from_norm,
        input_scale=plan.input_scale * (1.0 if plan.norm_in else unit),
        branch_scale=plan.branch_scale / joined,
        residual_scale=residual / joined,
        skip_scale=skip / joined,
        norm_q=plan.norm_q,
        norm_k=plan.norm_k,
        norm_v=plan.norm_v,
        norm_last=plan.norm_last,
        entering=unit,
        joined=joined,
    )

"""One sublayer and one layer as data: where norms sit, and the residual algebra's coefficients.

`model/depth/scheme.py` has the equation that they are for, `schemes.py` beside it makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Sublayer:
    """Coefficients and norm positions of one sublayer; `model/depth/scheme.py` has the equation."""

    norm_in: bool = False
    norm_branch: bool = False
    norm_out: bool = False
    residual_from_norm: bool = False
    input_scale: float = 1.0
    branch_scale: float = 1.0
    residual_scale: float = 1.0
    skip_scale: float = 0.0
    norm_q: bool = False
    norm_k: bool = False
    norm_v: bool = False
    norm_last: bool = False

    @property
    def inner(self) -> tuple[Literal["q", "k", "v"], ...]:
        """Which of queries, keys and values are normed inside attention."""
        given = {"q": self.norm_q, "k": self.norm_k, "v": self.norm_v}
        return tuple(role for role in ("q", "k", "v") if given[role])

    def __post_init__(self) -> None:
        if self.residual_from_norm and not self.norm_in:
            raise ValueError(
                "residual_from_norm needs norm_in: there is no normed input to take the residual from"
            )


@dataclass(frozen=True)
class Layer:
    """The sublayers of one transformer layer, in order."""

    attention: Sublayer
    mlp: Sublayer
    cross: Sublayer = field(default_factory=Sublayer)
    """Used by encoder-decoder stacks only."""
    gate: bool = False
    """One learned scalar g of the layer: every sum x of a sublayer becomes x - silu(g) x.

    Gradients pass as if it were not there: they do not see the second x.
    """

    def __post_init__(self) -> None:
        if self.mlp.inner or self.cross.inner or self.cross.norm_last:
            raise ValueError("cross-attention has no norms inside, a feed-forward none of queries")
        if self.gate and self.attention.norm_out:
            raise ValueError("a gate after a sum that is normed has no effect: norm_out excludes gate")

"""Settings that carry over to deeper models: what becomes of a plan away from its base depth.

CompleteP (Dey et al. 2025): with m = layers / base layers, every branch is multiplied by m^-alpha.
All else that a scheme derives from the number of layers stays as it is at the base depth. At the
base depth the plan is the scheme's own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Transfer:
    """What a scheme says about it."""

    keeps_variance: bool = False
    """The residual's factor follows the branch's, so that their squares add up to 1."""
    option: str | None = None
    """The scheme's option without which there is no rule."""


@dataclass(frozen=True)
class Reach:
    """How far a model is from its base in depth."""

    base: int
    """Layers of the base."""
    alpha: float

    def shrinkage(self, layers: int) -> float:
        """Factor on the branches of a model of so many layers; exactly 1 at the base."""
        return float((layers / self.base) ** -self.alpha)

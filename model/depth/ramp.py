"""Progressive residual warm-up: how much of each branch counts at which step (Chen et al. 2026).

    x' = ... + a(l, t) F(...),    t steps done, l the layer's number from 1, N layers, span T

Every branch of a layer is multiplied by the same a, on top of what the scheme says, and layers come
in from the bottom up. At the end, after T N steps, a is 1 everywhere and the model is the scheme's.
Kinds and formulas are those of the authors' code. A new kind is one entry of `RAMPS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A layer at a step."""

    layer: int
    """Global, from 1."""
    layers: int
    """Of the model."""
    span: int
    """Steps in which the first layer comes in."""
    done: int
    """Optimizer steps done."""


Ramp = Callable[[Place], float]
"""Share of a branch before it is cut to 0 .. 1."""

RAMPS: dict[str, Ramp] = {
    # Layer l is whole after l spans.
    "linear": lambda at: at.done / (at.span * at.layer),
    "linear_square": lambda at: (at.done / (at.span * at.layer)) ** 2,
    # Layer l comes in while those below it are whole.
    "stagewise": lambda at: (at.done - at.span * (at.layer - 1)) / at.span,
    # All layers together, in as many steps as the others take in all.
    "equal": lambda at: at.done / (at.span * at.layers),
}


def share(kind: str, layer: int, layers: int, span: int, done: int) -> float:
    """What counts of the branches of layer `layer`, from 0 to 1.

    Raises KeyError for another kind.
    """
    return min(1.0, max(0.0, RAMPS[kind](Place(layer, layers, span, done))))


def end(layers: int, span: int) -> int:
    """Steps after which every branch counts in full, whatever the kind."""
    return layers * span

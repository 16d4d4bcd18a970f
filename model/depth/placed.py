"""Where the layers of a model stand: one sequence, stack after stack."""

from __future__ import annotations

from dataclasses import dataclass

from model.depth.folded import FoldedLayer
from model.depth.sublayer import Layer
from model.families.family import Stack


@dataclass(frozen=True)
class PlacedLayer:
    """One layer of a model, in the order in which pipeline stages hold them."""

    number: int
    """0-based, over all stacks."""
    stack: Stack
    index: int
    """0-based, in its stack."""
    depth: int
    """Layers of its stack."""
    plan: Layer
    folded: FoldedLayer
    """The plan in the units in which it is computed (`model/depth/folded.py`)."""

    @property
    def prefix(self) -> str:
        """The beginning of its parameters' canonical names."""
        return self.stack.layer(self.index)

    @property
    def last(self) -> bool:
        """Whether it is its stack's last."""
        return self.index == self.depth - 1

    @property
    def sublayers(self) -> int:
        """Of the layer; what it costs grows with them."""
        return self.stack.sublayers

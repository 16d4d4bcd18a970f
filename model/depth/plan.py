"""A stack's depth plan: what its scheme makes of every layer, as plain data without the scheme's name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from model.depth.folded import FoldedLayer, folded
from model.depth.scheme import SCHEMES, Layer, Options, Sublayer


@dataclass(frozen=True)
class DepthPlan:
    """Coefficients and norm positions of every layer, and the norms around the stack."""

    layers: tuple[Layer, ...]
    embedding_norm: bool
    final_norm: bool

    @classmethod
    def of(
        cls, scheme: str, num_layers: int, options: Options | None = None, *, sublayers: int = 2
    ) -> DepthPlan:
        """The plan of a stack.

        sublayers: of one layer, 3 with cross-attention.
        Raises KeyError for an unknown scheme, ValueError for options it lacks or that are out of range.
        """
        chosen = SCHEMES[scheme]
        return cls(chosen.plan(num_layers, options, sublayers), chosen.embedding_norm, chosen.final_norm)

    def folded(self) -> tuple[FoldedLayer, ...]:
        """The layers in the units in which they are computed (`model/depth/folded.py`)."""
        return folded(self.layers)

    def in_float32(self) -> DepthPlan:
        """The same plan with the constants that float32 tensors are multiplied by.

        A thousand layers turn the rounding of one residual constant into a relative error of 1e-4.
        The trained model has that error, and a fold must have it too.
        """

        def rounded(sublayer: Sublayer) -> Sublayer:
            return replace(
                sublayer,
                input_scale=float(np.float32(sublayer.input_scale)),
                branch_scale=float(np.float32(sublayer.branch_scale)),
                residual_scale=float(np.float32(sublayer.residual_scale)),
                skip_scale=float(np.float32(sublayer.skip_scale)),
            )

        return replace(
            self, layers=tuple(Layer(rounded(layer.attention), rounded(layer.mlp)) for layer in self.layers)
        )

    def sublayers(self) -> list[tuple[int, str, Sublayer]]:
        """All sublayers in the order in which the stream passes them.

        Each is (0-based layer, "attention" or "mlp", its coefficients).
        """
        return [
            (index, kind, sublayer)
            for index, layer in enumerate(self.layers)
            for kind, sublayer in (("attention", layer.attention), ("mlp", layer.mlp))
        ]

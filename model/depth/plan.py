"""A model's depth plan as plain data: what conversion looks at instead of a scheme's name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from model.config import ModelConfig
from model.depth.folded import FoldedLayer, folded
from model.depth.scheme import SCHEMES, Layer, Sublayer


@dataclass(frozen=True)
class Plan:
    """Coefficients and norm positions of every layer, and the norms around the stack."""

    layers: tuple[Layer, ...]
    embedding_norm: bool
    final_norm: bool

    @classmethod
    def of(cls, config: ModelConfig) -> Plan:
        """The plan of a configuration. Raises ValueError on scheme options out of range."""
        scheme = SCHEMES[config.scheme]
        return cls(
            scheme.plan(config.num_layers, config.scheme_options), scheme.embedding_norm, scheme.final_norm
        )

    def folded(self) -> tuple[FoldedLayer, ...]:
        """The layers in the units in which they are computed (`model/depth/folded.py`)."""
        return folded(self.layers)

    def in_float32(self) -> Plan:
        """The same plan with the constants that float32 tensors are multiplied by.

        A thousand layers turn the rounding of one residual constant into a relative error of 1e-4, which the trained model has and a fold must have too.
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
        """All (0-based layer, "attention" or "mlp", sublayer), in the order in which the stream passes them."""
        return [
            (index, kind, sublayer)
            for index, layer in enumerate(self.layers)
            for kind, sublayer in (("attention", layer.attention), ("mlp", layer.mlp))
        ]

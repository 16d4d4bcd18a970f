"""A model's depth plan as plain data: what conversion looks at instead of a scheme's name."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig
from model.scheme import SCHEMES, Layer, Sublayer


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
        return cls(scheme.plan(config.num_layers, config.scheme_options), scheme.embedding_norm, scheme.final_norm)

    def sublayers(self) -> list[tuple[int, str, Sublayer]]:
        """All (0-based layer, "attention" or "mlp", sublayer), in the order in which the stream passes them."""
        return [(index, kind, sublayer) for index, layer in enumerate(self.layers) for kind, sublayer in (("attention", layer.attention), ("mlp", layer.mlp))]

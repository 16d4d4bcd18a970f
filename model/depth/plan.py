"""A stack's depth plan: what its scheme makes of every layer.

It is plain data without the scheme's name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.depth.folded import FoldedLayer, FoldedSublayer, folded
from model.depth.scheme import Options
from model.depth.schemes import SCHEMES
from model.depth.sublayer import Layer, Sublayer
from model.depth.transfer import Reach


@dataclass(frozen=True)
class DepthPlan:
    """Coefficients and norm positions of every layer, and the norms around the stack."""

    layers: tuple[Layer, ...]
    embedding_norm: bool
    final_norm: bool
    """After the last layer, as a norm of the stack's own."""
    cross: bool = False
    """The layers have cross-attention."""

    @classmethod
    def of(
        cls,
        scheme: str,
        num_layers: int,
        options: Options | None = None,
        *,
        sublayers: int = 2,
        reach: Reach | None = None,
        other: int | None = None,
    ) -> DepthPlan:
        """The plan of a stack.

        sublayers: of one layer, 3 with cross-attention. reach, other: as `Scheme.plan`.
        Raises KeyError for an unknown scheme.
        Raises ValueError for options it lacks or that are out of range.
        """
        chosen = SCHEMES[scheme]
        layers = chosen.plan(num_layers, options, sublayers, reach, other)
        return cls(layers, chosen.embedding_norm, chosen.final_norm, sublayers == 3)

    def closed(self) -> DepthPlan:
        """The plan with the norm after the stack as one of its last layer.

        So is it where other layers follow, those of the next stack.
        """
        if not self.final_norm:
            return self
        *below, top = self.layers
        top = replace(top, mlp=replace(top.mlp, norm_out=True))
        return replace(self, layers=(*below, top), final_norm=False)

    def with_score_norms(self) -> DepthPlan:
        """The same with norms on every head's queries and keys.

        Raises ValueError for a scheme that has norms there anyway.
        """
        if any(layer.attention.inner for layer in self.layers):
            raise ValueError(
                "model.attention.qk_norm=true has no effect with a scheme that norms queries and keys "
                "itself: remove it or choose another model.scheme"
            )
        layers = (
            replace(layer, attention=replace(layer.attention, norm_q=True, norm_k=True))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def without_score_norms(self) -> DepthPlan | None:
        """The plan that `with_score_norms` makes this of; None where it makes none so."""
        if any(layer.attention.inner != ("q", "k") for layer in self.layers):
            return None
        layers = (
            replace(layer, attention=replace(layer.attention, norm_q=False, norm_k=False))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def without_first_norm(self) -> DepthPlan:
        """The same without the first sublayer's norm, in the place of which the embedding's stands.

        Raises ValueError where the one is missing, or the other.
        """
        first = self.layers[0]
        if not first.attention.norm_in or not self.embedding_norm:
            missing = "norm before its first attention" if self.embedding_norm else "norm on the embedding"
            raise ValueError(f"model.first_norm=false needs a {missing}, and this model has none: remove it")
        bare = replace(first, attention=replace(first.attention, norm_in=False))
        return replace(self, layers=(bare, *self.layers[1:]))

    def with_first_norm(self) -> DepthPlan | None:
        """The plan that `without_first_norm` makes this of; None where it makes none so."""
        first = self.layers[0]
        if first.attention.norm_in or not self.embedding_norm:
            return None
        normed = replace(first, attention=replace(first.attention, norm_in=True))
        return replace(self, layers=(normed, *self.layers[1:]))

    @property
    def last_norm(self) -> str | None:
        """Canonical name of the norm that the stream passes last, without its leaf.

        None where a residual sum is the output of the stack.
        """
        if self.final_norm:
            return "decoder.final_layernorm"
        if self.layers[-1].mlp.norm_out:
            return f"decoder.layers.{len(self.layers) - 1}.mlp_output_norm"
        return None

    def folded(self) -> tuple[FoldedLayer, ...]:
        """The layers in the units in which they are computed (`model/depth/folded.py`)."""
        return folded(self.layers, cross=self.cross)

    def sublayers(self) -> list[tuple[int, str, Sublayer]]:
        """All sublayers in the order in which the stream passes them.

        Each is (0-based layer, "attention", "cross" or "mlp", its coefficients).
        """
        return [
            (index, kind, getattr(layer, kind))
            for index, layer in enumerate(self.layers)
            for kind in self.kinds
        ]

    def folded_sublayers(self) -> list[tuple[int, str, FoldedSublayer]]:
        """As `sublayers`, in the units in which they are computed."""
        return [
            (index, kind, getattr(layer, kind))
            for index, layer in enumerate(self.folded())
            for kind in self.kinds
        ]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of a layer's sublayers, in order."""
        return ("attention", "cross", "mlp") if self.cross else ("attention", "mlp")

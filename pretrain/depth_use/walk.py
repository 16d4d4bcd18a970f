"""A model that is walked layer by layer, with stretches of layers left out.

A place is a number from 0, before the first layer, to N, after the last.
Layers compute in units that change along the depth (`model/depth/folded.py`).
A stream that is taken from one place to another without the layers between them is brought into
the units of the other place, so that the stream of the scheme's equation passes through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from model.layers.layer import DepthLayer
from model.layers.residual import ResidualJoin
from model.network.language_model import LanguageModel


class Walk:
    """A model's layers one by one, on one process and without gradients."""

    def __init__(self, model: LanguageModel) -> None:
        layers: Any = model.decoder.layers
        self.model = model
        self.layers: list[DepthLayer] = list(layers)
        self.units = [layer.plan.entering for layer in self.layers] + [self.layers[-1].plan.leaving]
        """Of the stream at every place."""
        end = self.layers[-1]
        closes = model.decoder.final_layernorm is None and end.plan.mlp.norm_out
        self.closing: Callable[[Tensor], Tensor] | None = end.mlp_output_norm if closes else None
        """The norm that ends the last layer, where the stack has none after it."""

    @property
    def last(self) -> int:
        """The place after the last layer."""
        return len(self.layers)

    def enter(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """The stream [s, b, h] at place 0 of a batch, and what layers read beside it."""
        return self.model.enter(batch)

    def run(self, stream_sbh: Tensor, start: int, stop: int, beside: dict[str, Any]) -> Tensor:
        """Takes the stream from place `start` to place `stop` through the layers between them.

        beside: what `enter` gives.
        """
        for layer in self.layers[start:stop]:
            stream_sbh, _ = layer(hidden_states=stream_sbh, **beside)
        return stream_sbh

    def skip(self, stream_sbh: Tensor, start: int, stop: int) -> Tensor:
        """Takes the stream from place `start` to place `stop` past the layers between them.

        A norm that closes the whole stack is no part of its last layer: the model's end needs it.
        """
        closing = self.closing if start < stop == self.last else None
        unit = self.layers[-1].plan.mlp.joined if closing else self.units[stop]
        factor = self.units[start] / unit
        if factor != 1.0:
            stream_sbh = stream_sbh * factor
        return closing(stream_sbh) if closing else stream_sbh

    def log_probabilities(self, stream_sbh: Tensor, place: int) -> Tensor:
        """What the model's end makes of the stream at a place: [b, s, V], at least fp32, in nats.

        Its end is the norm after the stack, or the one that ends the last layer, and the output
        projection.
        """
        logits_bsv = self.model.leave(self.skip(stream_sbh, place, self.last))
        dtype = torch.promote_types(logits_bsv.dtype, torch.float32)
        return torch.log_softmax(logits_bsv[..., : self.model.true_vocab], dim=-1, dtype=dtype)


class Branches:
    """Mean squares of one layer's branches and of what they are added to, over one pass.

    A context manager: it listens while it is open.
    """

    def __init__(self, layer: DepthLayer) -> None:
        self.joins = (layer.self_attention_join, layer.mlp_join)
        self.seen: list[tuple[float, float]] = []
        """(Branch, what it is added to) of attention, then of the feed-forward."""

    def __enter__(self) -> Branches:
        self.handles = [join.register_forward_hook(self._joined) for join in self.joins]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _joined(self, join: ResidualJoin, args: tuple[Any, ...], output: Tensor) -> None:
        """Both parts are in the units of the sum, so that their ratio is the equation's."""
        branch, factor, kept = join.terms(*args)
        self.seen.append((_mean_square(branch) * float(factor) ** 2, _mean_square(kept)))


def _mean_square(x: Tensor) -> float:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return float(torch.linalg.vector_norm(x, dtype=dtype).square() / x.numel())

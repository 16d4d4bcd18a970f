"""Which stream a layer works on, where an encoder's and a decoder's pass it together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from model.layers.layer import DepthLayer
from model.layers.seam import DecoderLayer, EncoderLayer, SeamLayer

EVERYTHING = slice(None)


def entering(layer: DepthLayer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, slice]:
    """The tensor that a layer changes, and the rows of it that are its own stack's.

    args, kwargs: of its forward pass. A chunk's first layer gets both streams in one tensor.
    """
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    if not isinstance(layer, SeamLayer):
        return stream, EVERYTHING
    context: Tensor | None = kwargs.get("context")
    encoder = isinstance(layer, EncoderLayer)
    if context is not None:
        return (context if encoder else stream), EVERYTHING
    rows = kwargs["context_mask"].shape[-1] // layer.shards
    return stream, slice(rows) if encoder else slice(rows, None)


def leaving(layer: DepthLayer, output: tuple[Tensor, Any]) -> Tensor:
    """The stream of a layer's stack after it.

    output: of its forward pass. A chunk's last layer gives both streams in one tensor.
    """
    if isinstance(layer, EncoderLayer):
        context: Tensor = output[1]
        return context
    if isinstance(layer, DecoderLayer) and layer.hands_on:
        return output[0][len(output[1]) :]
    return output[0]

"""The activation of a feed-forward with the bias before it and its gate in one pass over memory.

Apart it is one pass, and with a gate two or three; a second pass backward sums the gradient of the
bias, which comes out of the same pass here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model.layers.torch_parts import ColumnLinear, LocalMLP, RowLinear
from model.layers.transformer_config import Activation

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

Activated = Callable[[Tensor, "Tensor | None", Activation, bool], Tensor]
"""Takes and gives what `model.layers.torch_parts.activated` does."""

Feed = Callable[[Tensor, ColumnLinear, RowLinear, Activation, bool], Tensor]
"""Takes and gives what `model.layers.product_pass.feed_pass` does."""


def activate_at_once(chunks: Iterable[MegatronModule], function: Activated) -> int:
    """Has feed-forwards of PyTorch's parts computed so in training; returns their number.

    function: what computes the pass. Their first products leave their biases to it.
    """
    parts = [part for chunk in chunks for part in chunk.modules() if isinstance(part, LocalMLP)]
    for part in parts:
        part.activate = function
        part.linear_fc1.leaves_bias = True
    return len(parts)


def activate_in_products(layers: Iterable[Any], feed: Feed) -> int:
    """Has feed-forwards of these layers computed so in training; returns their number.

    feed: what computes one, with the activation inside of its products.
    Feed-forwards with a norm between activation and second product stay as they are.
    Without tensor parallelism.
    """
    parts = [layer.mlp for layer in layers if layer.mlp.linear_fc2.input_norm is None]
    for part in parts:
        part.feed = feed
    return len(parts)

"""LayerNorm Scaling (Sun et al. 2025, "The Curse of Depth").

Pre-norm whose norm outputs are divided by sqrt(l), l the layer's number from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def layer(x: Tensor, w: Weights, o: Options, number: int) -> Tensor:
    """h = x + A(LN1(x) / sqrt(l)); y = h + F(LN2(h) / sqrt(l))."""
    h = x + o.drop(attention(norm(x, w, "ln1", o) / math.sqrt(number), w, o))
    return h + o.drop(feed_forward(norm(h, w, "ln2", o) / math.sqrt(number), w, o))


def stack(x: Tensor, layers: Sequence[Weights], o: Options, trace: list[Tensor] | None = None) -> Tensor:
    """All layers. trace: gets every layer's output."""
    for number, w in enumerate(layers, start=1):
        x = layer(x, w, o, number)
        if trace is not None:
            trace.append(x)
    return x

"""HybridNorm (Zhuo et al. 2025): y = x + A(x); x <- LN(y) + F(LN(y)).

A norms the queries, keys and values of every head, over the width of a head.
HybridNorm*: the first layer's attention has an input norm, and its feed-forward's residual is y.
The norm after the stack belongs to the model around it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def stack(
    x: Tensor,
    layers: Sequence[Weights],
    o: Options,
    star: bool = False,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """All layers. trace: gets every layer's output."""
    for index, w in enumerate(layers):
        first = star and index == 0
        y = x + o.drop(attention(norm(x, w, "ln1", o) if first else x, w, o))
        normed = norm(y, w, "ln2", o)
        x = (y if first else normed) + o.drop(feed_forward(normed, w, o))
        if trace is not None:
            trace.append(x)
    return x

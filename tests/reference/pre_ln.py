"""Pre-norm (Xiong et al. 2020): x <- x + F(LN(x)).

The norm after the stack belongs to the model around it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def layer(x: Tensor, w: Weights, o: Options) -> Tensor:
    """h = x + A(LN1(x)); y = h + F(LN2(h))."""
    h = x + o.drop(attention(norm(x, w, "ln1", o), w, o))
    return h + o.drop(feed_forward(norm(h, w, "ln2", o), w, o))


def stack(x: Tensor, layers: Sequence[Weights], o: Options, trace: list[Tensor] | None = None) -> Tensor:
    """All layers. trace: gets every layer's output."""
    for w in layers:
        x = layer(x, w, o)
        if trace is not None:
            trace.append(x)
    return x

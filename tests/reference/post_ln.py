"""Post-norm (Vaswani et al. 2017): x <- LN(x + F(x)) for attention, then for the feed-forward.

No norm follows the stack.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def layer(x: Tensor, w: Weights, o: Options) -> Tensor:
    """h = LN1(x + A(x)); y = LN2(h + F(h))."""
    h = norm(x + o.drop(attention(x, w, o)), w, "ln1", o)
    return norm(h + o.drop(feed_forward(h, w, o)), w, "ln2", o)


def stack(x: Tensor, layers: Sequence[Weights], o: Options, trace: list[Tensor] | None = None) -> Tensor:
    """All layers. trace: gets every layer's output."""
    for w in layers:
        x = layer(x, w, o)
        if trace is not None:
            trace.append(x)
    return x

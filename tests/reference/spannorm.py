"""SpanNorm (2026; FuseNorm in an earlier submission).

Post-norm whose feed-forward residual is the layer's input, not the attention's output.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def layer(x: Tensor, w: Weights, o: Options) -> Tensor:
    """h = LN1(x + A(x)); y = LN2(x + F(h))."""
    h = norm(x + o.drop(attention(x, w, o)), w, "ln1", o)
    return norm(x + o.drop(feed_forward(h, w, o)), w, "ln2", o)


def stack(x: Tensor, layers: Sequence[Weights], o: Options, trace: list[Tensor] | None = None) -> Tensor:
    """All layers, from an embedding that has been normed. trace: gets every layer's output."""
    for w in layers:
        x = layer(x, w, o)
        if trace is not None:
            trace.append(x)
    return x

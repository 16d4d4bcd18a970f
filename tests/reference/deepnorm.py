"""DeepNorm (Wang et al. 2022, "DeepNet"): x <- LN(a x + F(x)).

a = (2N)^(1/4) for a decoder-only or encoder-only stack of N layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def layer(x: Tensor, w: Weights, o: Options, a: float) -> Tensor:
    """h = LN1(a x + A(x)); y = LN2(a h + F(h))."""
    h = norm(a * x + o.drop(attention(x, w, o)), w, "ln1", o)
    return norm(a * h + o.drop(feed_forward(h, w, o)), w, "ln2", o)


def stack(x: Tensor, layers: Sequence[Weights], o: Options, trace: list[Tensor] | None = None) -> Tensor:
    """All layers. trace: gets every layer's output."""
    a = (2 * len(layers)) ** 0.25
    for w in layers:
        x = layer(x, w, o, a)
        if trace is not None:
            trace.append(x)
    return x

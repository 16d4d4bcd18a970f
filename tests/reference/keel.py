"""Keel (Chen & Wei 2026): x <- LN_out(a x + F(LN_in(x))), a the number of sublayers of the stack.

Two exceptions: the first attention sublayer has no outer norm,
and a is 1 in the first attention and the first feed-forward sublayer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def stack(
    x: Tensor,
    layers: Sequence[Weights],
    o: Options,
    alpha: float | None = None,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """All layers. alpha: None for the number of sublayers. trace: gets every layer's output."""
    for index, w in enumerate(layers):
        a = 1.0 if index == 0 else (alpha or 2.0 * len(layers))
        h = a * x + o.drop(attention(norm(x, w, "ln1", o), w, o))
        if index > 0:
            h = norm(h, w, "ln1_out", o)
        x = norm(a * h + o.drop(feed_forward(norm(h, w, "ln2", o), w, o)), w, "ln2_out", o)
        if trace is not None:
            trace.append(x)
    return x

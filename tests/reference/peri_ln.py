"""Peri-LN (Kim et al. 2025): x <- x + LN_out(F(LN_in(x))).

The norms on the embedding and after the stack belong to the model around it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def layer(x: Tensor, w: Weights, o: Options) -> Tensor:
    """h = x + LN1_out(A(LN1(x))); y = h + LN2_out(F(LN2(h)))."""
    h = x + o.drop(norm(attention(norm(x, w, "ln1", o), w, o), w, "ln1_out", o))
    return h + o.drop(norm(feed_forward(norm(h, w, "ln2", o), w, o), w, "ln2_out", o))


def stack(x: Tensor, layers: Sequence[Weights], o: Options, trace: list[Tensor] | None = None) -> Tensor:
    """All layers. trace: gets every layer's output."""
    for w in layers:
        x = layer(x, w, o)
        if trace is not None:
            trace.append(x)
    return x

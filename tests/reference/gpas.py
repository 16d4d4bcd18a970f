"""GPAS on pre-norm (Chen et al. 2025): x <- x + F(LN(x)), then x <- x - silu(g) stopgrad(x).

One scalar g a layer serves both sublayers.
The norm after the stack belongs to the model around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def scaled(x: Tensor, g: Tensor) -> Tensor:
    """x - silu(g) x, the second x a constant to gradients."""
    return x - g * torch.sigmoid(g) * x.detach()


def layer(x: Tensor, w: Weights, o: Options) -> Tensor:
    """h = G(x + A(LN1(x))); y = G(h + F(LN2(h)))."""
    h = scaled(x + o.drop(attention(norm(x, w, "ln1", o), w, o)), w["gate"])
    return scaled(h + o.drop(feed_forward(norm(h, w, "ln2", o), w, o)), w["gate"])


def stack(x: Tensor, layers: Sequence[Weights], o: Options, trace: list[Tensor] | None = None) -> Tensor:
    """All layers. trace: gets every layer's output."""
    for w in layers:
        x = layer(x, w, o)
        if trace is not None:
            trace.append(x)
    return x

"""DeepScaleLM (Kedia et al. 2024, "Transformers Get Stable").

lambda R + Dropout(beta (F(N) + bias)), lambda^2 + beta^2 = 1.
beta^2 = k / (2 layers)^alpha: one term for each sublayer of the whole stack.
Pre-norm: R = x, N = LN(x), a norm follows the stack.
Post-norm, as the authors' code has it: R = N = LN(x) at each sublayer's input.
One more norm stands at the end.
Unrolled, it is LN on the embedding and LN(lambda x + beta F(x)) for each sublayer.
It is written so here (ln1, ln2 follow attention and feed-forward).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def constants(layers: int, k: float = 2.0, alpha: float = 1.0) -> tuple[float, float]:
    """(lambda, beta) of a stack of `layers` layers, two sublayers each."""
    square = k / (2 * layers) ** alpha
    return math.sqrt(1 - square), math.sqrt(square)


def pre_ln_layer(x: Tensor, w: Weights, o: Options, lam: float, beta: float) -> Tensor:
    """h = lambda x + beta A(LN1(x)); y = lambda h + beta F(LN2(h))."""
    h = lam * x + o.drop(beta * attention(norm(x, w, "ln1", o), w, o))
    return lam * h + o.drop(beta * feed_forward(norm(h, w, "ln2", o), w, o))


def post_ln_layer(x: Tensor, w: Weights, o: Options, lam: float, beta: float) -> Tensor:
    """h = LN1(lambda x + beta A(x)); y = LN2(lambda h + beta F(h))."""
    h = norm(lam * x + o.drop(beta * attention(x, w, o)), w, "ln1", o)
    return norm(lam * h + o.drop(beta * feed_forward(h, w, o)), w, "ln2", o)


def pre_ln_stack(
    x: Tensor,
    layers: Sequence[Weights],
    o: Options,
    k: float = 2.0,
    alpha: float = 1.0,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """All pre-norm layers. trace: gets every layer's output."""
    lam, beta = constants(len(layers), k, alpha)
    for w in layers:
        x = pre_ln_layer(x, w, o, lam, beta)
        if trace is not None:
            trace.append(x)
    return x


def post_ln_stack(
    x: Tensor,
    layers: Sequence[Weights],
    o: Options,
    k: float = 2.0,
    alpha: float = 1.0,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """All post-norm layers, from an embedding that has been normed.

    trace: gets every layer's output.
    """
    lam, beta = constants(len(layers), k, alpha)
    for w in layers:
        x = post_ln_layer(x, w, o, lam, beta)
        if trace is not None:
            trace.append(x)
    return x

"""B2T connection, as the authors coded it.

Takase et al. 2023, "B2T Connection: Serving Stability and Performance in Deep Transformers".
Post-norm layers whose input skips every norm but the last.
It is added, coefficient 1, to the residual sum before that last norm.
The skipped part has no dropout and no parameters. No norm follows the stack.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def encoder_layer(x: Tensor, w: Weights, o: Options, hide: Tensor | None = None) -> Tensor:
    """h = LN1(x + A(x)); y = LN2(x + h + F(h)). Also a decoder-only layer, under a causal mask."""
    h = norm(x + o.drop(attention(x, w, o, hide=hide)), w, "ln1", o)
    return norm(x + h + o.drop(feed_forward(h, w, o)), w, "ln2", o)


def decoder_layer(
    x: Tensor, memory: Tensor, w: Weights, o: Options, hide_memory: Tensor | None = None
) -> Tensor:
    """h1 = LN1(x + A(x)); h2 = LN2(h1 + C(h1, memory)); y = LN3(x + h2 + F(h2)).

    Cross-attention weights are cq, ck, cv, co (biases cbq, ...).
    """
    h1 = norm(x + o.drop(attention(x, w, o)), w, "ln1", o)
    h2 = norm(h1 + o.drop(attention(h1, w, o, prefix="c", memory=memory, hide=hide_memory)), w, "ln2", o)
    return norm(x + h2 + o.drop(feed_forward(h2, w, o)), w, "ln3", o)


def stack(x: Tensor, layers: Sequence[Weights], o: Options, trace: list[Tensor] | None = None) -> Tensor:
    """Encoder or decoder-only layers. trace: gets every layer's output."""
    for w in layers:
        x = encoder_layer(x, w, o)
        if trace is not None:
            trace.append(x)
    return x


def decoder_stack(x: Tensor, memory: Tensor, layers: Sequence[Weights], o: Options) -> Tensor:
    """Decoder layers with cross-attention to a fixed encoder output."""
    for w in layers:
        x = decoder_layer(x, memory, w, o)
    return x

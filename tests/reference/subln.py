"""Sub-LN (Wang et al. 2023): x <- x + F(LN(x)), F with a norm before its last matrix.

That is of what the heads give, before the output projection, and of the hidden layer, before fc2.
The norm after the stack belongs to the model around it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def stack(x: Tensor, layers: Sequence[Weights], o: Options, trace: list[Tensor] | None = None) -> Tensor:
    """All layers. trace: gets every layer's output."""
    for w in layers:
        h = x + o.drop(attention(norm(x, w, "ln1", o), w, o))
        x = h + o.drop(feed_forward(norm(h, w, "ln2", o), w, o))
        if trace is not None:
            trace.append(x)
    return x

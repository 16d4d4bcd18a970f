"""Mix-LN (Li et al. 2024): post-norm in the first floor(fraction x N) layers, pre-norm above.

The norm after the stack belongs to the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tests.reference import post_ln, pre_ln
from tests.reference.parts import Options, Weights


def stack(
    x: Tensor,
    layers: Sequence[Weights],
    o: Options,
    post_fraction: float = 0.25,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """All layers. trace: gets every layer's output."""
    post_layers = math.floor(post_fraction * len(layers))
    for index, w in enumerate(layers):
        x = post_ln.layer(x, w, o) if index < post_layers else pre_ln.layer(x, w, o)
        if trace is not None:
            trace.append(x)
    return x

"""Queries, keys and values out of their product in one pass over memory, forward and backward.

Apart the gradients of the three are turned back, put together, and read once more for the sum that
is the gradient of the product's bias. By a kernel of ours on GPUs; on CPUs they stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from model.layers.torch_parts import ColumnLinear, LocalSelfAttention, Separated

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


def separate_at_once(chunks: Iterable[MegatronModule], function: Separated) -> int:
    """Has self-attention of PyTorch's parts do so in training; returns the number of those that do.

    function: what computes the pass.
    """
    parts = [
        part
        for chunk in chunks
        for part in chunk.modules()
        if isinstance(part, LocalSelfAttention) and isinstance(part.linear_qkv, ColumnLinear)
    ]
    for part in parts:
        part.separate = function
        part.linear_qkv.lends_bias = True
    return len(parts)

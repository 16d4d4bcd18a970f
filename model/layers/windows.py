"""Attention to neighbours: which layers have it, and the mask that says so.

Megatron-core's configuration tells both by the global number of a layer (`window_size`,
`window_attn_skip_freq`). Transformer Engine's attention reads it there, and has kernels for it.
PyTorch's attention takes a mask, made once a micro-batch for all layers.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


def has_window(config: TransformerConfig, layer_number: int) -> bool:
    """Whether a layer sees no more than the window. layer_number: global, from 1."""
    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)


class WindowMask:
    """What the layers of one model hide, in one tensor [n, b or 1, 1, s, s]: True where hidden.

    Entry 0 is for layers with a window, and holds the causal mask too where there is one.
    Entry 1 is for the others, and missing where they hide nothing beside their own kind of mask.
    """

    def __init__(self, config: TransformerConfig) -> None:
        """config: with a window."""
        assert config.window_size is not None
        self.before, self.after = config.window_size
        layers = range(1, config.num_layers + 1)
        self.alternating = not all(has_window(config, number) for number in layers)

    def __call__(self, hidden_b1ss: Tensor | None, queries_s: Tensor, length: int) -> Tensor:
        """hidden_b1ss: what all layers hide, True where hidden; None where that is nothing.

        queries_s: positions of the rows; columns are all positions of a sequence of this length.
        """
        back_ss = queries_s[:, None] - torch.arange(length, device=queries_s.device)
        far_ss = (back_ss > self.before) | (back_ss < -self.after)
        if hidden_b1ss is None:
            return far_ss[None, None, None]
        both = hidden_b1ss | far_ss
        return torch.stack((both, hidden_b1ss)) if self.alternating else both[None]


def own_mask(mask: Tensor | None, windowed: bool) -> Tensor | None:
    """The part of a `WindowMask`'s tensor that one layer reads; any other mask is as it is."""
    if mask is None or mask.dim() < 5:
        return mask
    if windowed:
        return mask[0]
    return mask[1] if len(mask) > 1 else None


def own_table(table: Tensor, windowed: bool) -> Tensor:
    """A layer's own `rotary_table` [s, 1 or b, 1, 2 d] of one, or of two [s, 1 or b, 2, 2 d].

    The second is for layers with a window.
    """
    return table[:, :, int(windowed) :][:, :, :1] if table.shape[2] > 1 else table

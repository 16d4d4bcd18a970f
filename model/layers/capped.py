"""Attention whose scores have a soft cap, which no fused kernel of ours computes.

It serves both kinds of parts, PyTorch's and Transformer Engine's.
Scores and probabilities are kept for the backward pass: memory grows with the square of the length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from model.layers.torch_parts import SdpaAttention


def soft_capped(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap), any shape: x where it is small, and never beyond the cap; None: x."""
    return x if cap is None else torch.tanh(x / cap) * cap


class CappedAttention(SdpaAttention):
    """softmax(cap tanh(q k / (sqrt(d) cap))) v, scores and softmax in at least fp32 (Gemma 2)."""

    def __init__(self, *args: Any, soft_cap: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.soft_cap = soft_cap

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """As `SdpaAttention.attend`."""
        share = query.shape[1] // key.shape[1]
        if share > 1:
            key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = self.scaled.get("scale", query.shape[-1] ** -0.5)
        scores_bhst = soft_capped((query @ key.transpose(-1, -2)).to(wide) * scale, self.soft_cap)
        if self.causal and mask is None:
            queries, keys = scores_bhst.shape[-2:]  # the last of the keys have queries
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if mask is not None:
            # Added, not filled in: a sum keeps nothing for the backward pass.
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=wide).masked_fill(~mask, -torch.inf)
            scores_bhst = scores_bhst + mask
        probabilities_bhst = scores_bhst.softmax(-1).to(value.dtype)
        return F.dropout(probabilities_bhst, dropout) @ value if dropout else probabilities_bhst @ value


def core_attention(plain: type, soft_cap: float | None) -> type | ModuleSpec:
    """The attention between queries, keys and values: `plain`, or one with a cap on its scores."""
    return plain if soft_cap is None else ModuleSpec(module=CappedAttention, params={"soft_cap": soft_cap})

"""Forward passes of Transformer Engine's modules in plain PyTorch, on their own parameters.

With their own switches.
They are not its arithmetic, but its interface:
which norm sits where, what is returned, where biases go.
Enough to run a model that is made of these modules on a CPU in full precision,
and so to check how ours are put together. Numbers of the real kernels are checked on GPUs.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return (
        F.rms_norm(x, weight.shape, weight, eps)
        if bias is None
        else F.layer_norm(x, weight.shape, weight, bias, eps)
    )


def _linear(module: Any, x: Tensor, bias_in_product: bool) -> Tensor:
    bias = module.bias if module.apply_bias and bias_in_product else None
    return F.linear(x, module.weight, bias)


def layer_norm_linear(self: Any, inp: Tensor, is_first_microbatch: bool | None = None, **unused: Any) -> Any:
    """`transformer_engine.pytorch.LayerNormLinear.forward`: out, [bias,] [norm output]."""
    normed = _norm(inp, self.layer_norm_weight, self.layer_norm_bias, self.eps)
    out = _linear(self, normed, bias_in_product=True)
    returned = [out]
    returned += [self.bias] if self.return_bias else []
    returned += [normed] if self.return_layernorm_output else []
    return returned[0] if len(returned) == 1 else tuple(returned)


def linear(self: Any, inp: Tensor, is_first_microbatch: bool | None = None, **unused: Any) -> Any:
    """`transformer_engine.pytorch.Linear.forward`."""
    out = _linear(self, inp, bias_in_product=not self.gemm_bias_unfused_add)
    if self.gemm_bias_unfused_add:
        out = out + self.bias
    return (out, self.bias) if self.return_bias else out


def norm(self: Any, inp: Tensor) -> Tensor:
    """`transformer_engine.pytorch.LayerNorm.forward` and RMSNorm's."""
    return _norm(inp, self.weight, getattr(self, "bias", None), self.eps)


def attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    attn_mask_type: str,
    qkv_format: str | None = None,
    cu_seqlens_q: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """`transformer_engine.pytorch.DotProductAttention.forward` on [s, b, heads, d].

    On [t, heads, d] with qkv_format "thd": sequences one after the other, from bound to bound.
    Raises ValueError for a mask type that Fathom does not use, and for a mask beside another type.
    Raises RuntimeError for sequences that are cut: its ring of keys is no subject here.
    """
    if self.cp_group is not None:
        raise RuntimeError("a ring of keys")
    if qkv_format == "thd":
        if attn_mask_type != "padding_causal" or cu_seqlens_q is None:
            raise ValueError(f"attn_mask_type={attn_mask_type!r} for rows of sequences")
        bounds = cu_seqlens_q.tolist()
        parts = [
            attention(
                self, *(part[first:last, None] for part in (query, key, value)), attn_mask_type="causal"
            )
            for first, last in itertools.pairwise(bounds)
        ]
        assert bounds[-1] == len(query)
        return torch.cat(parts).flatten(1)
    if attn_mask_type not in ("causal", "no_mask", "arbitrary"):
        raise ValueError(f"attn_mask_type={attn_mask_type!r}")
    if (mask is None) is (attn_mask_type == "arbitrary"):
        raise ValueError(f"attn_mask_type={attn_mask_type!r} with mask={mask!r}")
    back = torch.arange(query.shape[0])[:, None] - torch.arange(key.shape[0])
    hidden = torch.zeros(1, 1, *back.shape, dtype=torch.bool) if mask is None else mask
    # A window of -1 is everything on that side.
    left, right = self.window_size or (-1, -1)
    hidden = hidden | ((back > left) & (left >= 0)) | ((back < -right) & (right >= 0))
    if attn_mask_type == "causal":
        hidden = hidden | (back < 0)
    q_bhsd, k_bhtd, v_bhtd = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    out = F.scaled_dot_product_attention(
        q_bhsd,
        k_bhtd,
        v_bhtd,
        attn_mask=~hidden,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def install(te: Any) -> None:
    """Replaces the forward passes of the modules of `transformer_engine.pytorch`."""
    for owner, forward in (
        (te.LayerNormLinear, layer_norm_linear),
        (te.Linear, linear),
        (te.LayerNorm, norm),
        (te.RMSNorm, norm),
        (te.DotProductAttention, attention),
    ):
        owner.forward = forward

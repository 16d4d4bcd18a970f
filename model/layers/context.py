"""Attention of sequences that are cut over context-parallel ranks.

With N ranks a sequence is cut into 2 N equal pieces, of which rank r has number r and number
2 N - 1 - r, in this order. Under a causal mask a piece costs the more the later it lies, and with
an early and a late one every rank has the same work (the zigzag of Zhu 2024 and of Llama 3).
Queries stay where they are; keys and values of all ranks are gathered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from model.layers.capped import CappedAttention
from model.layers.torch_parts import SdpaAttention

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def places(length: int, rank: int, ranks: int, device: torch.device | None = None) -> Tensor:
    """Positions in the whole sequence of a rank's tokens, rising, [length / ranks].

    length: of the whole sequence, a multiple of 2 ranks.
    """
    return own_pieces(torch.arange(length, device=device), 0, rank, ranks)


def own_pieces(whole: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """A rank's part of a tensor whose dimension `dim` runs over the whole sequence."""
    if ranks == 1:
        return whole
    pieces = whole.chunk(2 * ranks, dim)
    return torch.cat((pieces[rank], pieces[2 * ranks - 1 - rank]), dim)


class _GatheredPieces(torch.autograd.Function):
    """Keys and values of the whole sequence from those of every rank's pieces, in order.

    Backward sums the gradients of all ranks and gives each those of its own pieces.
    """

    @staticmethod
    def forward(
        ctx: Any, key_bgsd: Tensor, value_bgsd: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ranks = group, group.size()
        own = torch.stack((key_bgsd, value_bgsd))
        both, batch, groups, length, width = own.shape
        gathered = own.new_empty(ranks * both, batch, groups, length, width)
        dist.all_gather_into_tensor(gathered, own, group=group)
        early, late = gathered.view(ranks, both, batch, groups, 2, length // 2, width).unbind(4)
        ordered = torch.cat((early, late.flip(0)))
        whole = ordered.permute(1, 2, 3, 0, 4, 5).reshape(both, batch, groups, ranks * length, width)
        return whole[0], whole[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, key_bgtd: Tensor, value_bgtd: Tensor) -> tuple[Tensor, Tensor, None]:
        ranks: int = ctx.group.size()
        whole = torch.stack((key_bgtd, value_bgtd))
        both, batch, groups, length, width = whole.shape
        pieces = whole.view(both, batch, groups, 2 * ranks, length // (2 * ranks), width)
        ordered = pieces.permute(3, 0, 1, 2, 4, 5)
        early, late = ordered[:ranks], ordered[ranks:]
        own = whole.new_empty(both, batch, groups, length // ranks, width)
        sent = torch.stack((early, late.flip(0)), dim=4).view(ranks * both, *own.shape[1:])
        dist.reduce_scatter_tensor(own, sent, group=ctx.group)
        return own[0], own[1], None


def gathered_pieces(key_bgsd: Tensor, value_bgsd: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values [b, groups, s, d] of the whole sequence, in order, on every rank.

    key_bgsd, value_bgsd: of a rank's own pieces, [b, groups, s / ranks, d]. Collective.
    """
    whole: tuple[Tensor, Tensor] = _GatheredPieces.apply(  # type: ignore[no-untyped-call]
        key_bgsd, value_bgsd, group
    )
    return whole


class _Tail(torch.autograd.Function):
    """`causal_tail` on a CPU, without a mask and without scores: two calls of the flash kernel.

    One over the keys before all queries, one over the rest, joined by the logarithms of their sums.
    (PyTorch's own causal mask for fewer queries than keys is a whole tensor on a CPU.)
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        before = key.shape[2] - query.shape[2]
        ctx.before, ctx.scale = before, scale
        far, log_far = FLASH(query, key[:, :, :before], value[:, :, :before], scale=scale)
        near, log_near = FLASH(query, key[:, :, before:], value[:, :, before:], is_causal=True, scale=scale)
        log_sum = torch.logaddexp(log_far, log_near)
        out = far * (log_far - log_sum).exp()[..., None] + near * (log_near - log_sum).exp()[..., None]
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sum = ctx.saved_tensors
        parts = []
        for part, causal in ((slice(ctx.before), False), (slice(ctx.before, None), True)):
            pair = key[:, :, part], value[:, :, part]
            parts.append(FLASH_BACKWARD(grad_out, query, *pair, out, log_sum, 0.0, causal, scale=ctx.scale))
        (far_query, *far), (near_query, *near) = parts
        grad_key, grad_value = (torch.cat(both, dim=2) for both in zip(far, near, strict=True))
        return far_query + near_query, grad_key, grad_value, None


def causal_tail(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Causal attention of the last queries of a sequence, [b, heads, s, d].

    query: [b, heads, s, d]; key, value: [b, groups, t, d] with t >= s, of which query i sees the
    first t - s + i + 1. scale: of the scores, 1 / sqrt(d) without.
    """
    grouped = query.shape[1] != key.shape[1]
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout, True, scale=scale, enable_gqa=grouped
        )
    if not query.is_cuda and not dropout:
        out: Tensor = _Tail.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
        return out
    if grouped and query.dtype == torch.float32:  # the GPU's kernel for fp32 has no groups
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
        grouped = False
    bias: Any = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale, enable_gqa=grouped)


class _OfPieces(SdpaAttention):
    """What attention of a rank's two pieces does around that of a sequence's last queries."""

    gathers = True

    def __init__(self, config: TransformerConfig, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.group: dist.ProcessGroup = pg_collection.cp

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """As `SdpaAttention.attend`, all but the mask of the rank's own pieces.

        mask: its rows are those of the own queries, its columns all keys.
        """
        key, value = gathered_pieces(key, value, self.group)
        if mask is not None:
            return super().attend(query, key, value, mask, dropout)
        rank, ranks = self.group.rank(), self.group.size()
        length = query.shape[2] // 2
        found = []
        for half, number in zip(query.chunk(2, dim=2), (rank, 2 * ranks - 1 - rank), strict=True):
            end = (number + 1) * length
            found.append(self.tail(half, key[:, :, :end], value[:, :, :end], dropout))
        return torch.cat(found, dim=2)

    def tail(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Causal attention of the last queries of a sequence, as `causal_tail`."""
        return super().attend(query, key, value, None, dropout)


class ContextAttention(_OfPieces):
    """Core attention over torch's scaled_dot_product_attention, of a sequence's own pieces."""

    def tail(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """As `causal_tail`."""
        return causal_tail(query, key, value, dropout, self.scaled.get("scale"))


class ContextCapped(_OfPieces, CappedAttention):
    """Attention with a soft cap on its scores, of a sequence's own pieces."""


WITH_CONTEXT: dict[type, type] = {SdpaAttention: ContextAttention, CappedAttention: ContextCapped}
"""What stands for a core attention where sequences are cut.

That for Transformer Engine's joins them where it is (`model/layers/te_spec.py`).
"""


def of_pieces(spec: ModuleSpec) -> ModuleSpec:
    """The specification of a layer for sequences that are cut."""
    inside = spec.submodules.self_attention.submodules
    core = inside.core_attention
    if isinstance(core, ModuleSpec):
        inside.core_attention = replace(core, module=WITH_CONTEXT[core.module])
    else:
        inside.core_attention = WITH_CONTEXT[core]
    return spec

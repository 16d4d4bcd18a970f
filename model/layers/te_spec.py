"""The same layer from Transformer Engine's parts.

Norms are fused into the linear layer after them; attention goes through its fused back ends.

A norm that directly precedes a matrix product becomes part of it, by the data of
`model/depth/schemes.py`. Where the residual is taken after the norm (post-norm schemes, all but the
layer's last norm), the fused kernel also returns what it normed, so that no norm costs a pass of
its own. A norm stays apart where a factor stands between it and the matrix (`input_scale`),
on a branch, and at the end of a layer.

Importing this module needs Transformer Engine; raises ImportError without it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from model.depth.folded import FoldedLayer, FoldedSublayer
from model.layers.capped import core_attention
from model.layers.context import WITH_CONTEXT, ContextAttention
from model.layers.layer import DepthLayer, DepthLayerSubmodules
from model.layers.torch_parts import LocalCrossAttention, LocalSelfAttention, Norm

if not HAVE_TE:
    raise ImportError("Transformer Engine is not installed: its layers cannot be built")

__all__ = ["TENorm", "te_layer_spec"]

RING = (torch.float16, torch.bfloat16)
"""Formats in which Transformer Engine attends over sequences that are cut."""


class _BiasInside:
    """A linear layer adds its bias inside the product, whatever the caller offers to do with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"skip_bias_add": False})


class TEColumn(_BiasInside, TEColumnParallelLinear):
    """Column-parallel linear layer whose bias is added inside the matrix product."""


class TENormColumn(_BiasInside, TELayerNormColumnParallelLinear):
    """Norm and column-parallel linear layer in one, bias included."""


class TENormColumnWithResidual(TENormColumn):
    """Norm and column-parallel linear layer in one, which keeps the normed input for `take_normed`.

    Megatron-core's wrapper always builds with return_layernorm_output=False;
    the attribute is read at every forward pass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.return_layernorm_output = True
        self.normed: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x: [s, b, h] -> ([s, b, out / TP], None)."""
        (out, self.normed), _ = super().forward(x)
        return out, None

    def take_normed(self) -> Tensor:
        """The normed input [s, b, h] of the last forward pass, once: nothing is kept alive here."""
        normed, self.normed = self.normed, None
        assert normed is not None
        return normed


class TERow(TERowParallelLinear):
    """Row-parallel linear layer.

    Without tensor parallelism the bias goes into the matrix product instead of to the caller.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        alone = kwargs["config"].tensor_model_parallel_size == 1
        super().__init__(*args, **kwargs | {"skip_bias_add": kwargs["skip_bias_add"] and not alone})
        if alone:
            # Transformer Engine adds the bias of a row-parallel layer after the reduction
            # over ranks; here there is none.
            self.gemm_bias_unfused_add = False
        self.input_norm: nn.Module | None = None
        """Of what enters, where the layer has set one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [s, b, in / TP] -> ([s, b, out], bias if it is left to the caller)."""
        out: tuple[Tensor, Tensor | None] = super().forward(
            x if self.input_norm is None else self.input_norm(x)
        )
        return out


class TEAttention(TEDotProductAttention):
    """Core attention through Transformer Engine.

    It picks cuDNN's fused kernel, flash attention or its own by what the device has.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **kwargs: Any
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, **kwargs)
        self.mask_type = attn_mask_type
        if not self.attention_dropout:
            # Without dropout nothing is drawn, yet every call would exchange the random states
            # of host and GPU, which no CUDA graph may contain.
            for backend in (self.flash_attention, self.fused_attention, self.unfused_attention):
                backend.attention_dropout_ctx = contextlib.nullcontext

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns [s, b, heads d].

        query: [s, b, heads, d]; key, value: [t, b, groups, d].
        attention_mask: True hides, broadcastable to [b, 1, s, t]. Its form is not known to
        Transformer Engine, which has kernels of its own for causal masks alone.
        packed_seq_params: documents, for its kernels for rows of sequences.
        Raises ValueError for a mask beside the causal one.
        """
        kind = self.mask_type
        if packed_seq_params is not None:
            # One row after the other, as documents are counted: [b s, heads, d].
            rows = [part.transpose(0, 1).flatten(0, 1) for part in (query, key, value)]
            out = super().forward(
                *rows, None, packed_seq_params=packed_seq_params, **{"attn_mask_type": kind} | kwargs
            )
            return out.unflatten(0, (query.shape[1], query.shape[0])).transpose(0, 1).contiguous()
        if attention_mask is not None:
            if kind is AttnMaskType.causal:
                raise ValueError("attention under a causal mask takes no other mask")
            kind = AttnMaskType.arbitrary
            shape = (query.shape[1], 1, query.shape[0], key.shape[0])
            attention_mask = attention_mask.expand(shape)
        return super().forward(query, key, value, attention_mask, **{"attn_mask_type": kind} | kwargs)


class TEContextAttention(TEAttention):
    """Core attention over sequences that are cut over ranks.

    Transformer Engine passes keys and values in a ring, which has causal attention in 16 bits.
    Masks, of documents and of windows, and other formats have no form in it:
    they go through our own attention, over the same pieces.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.gathered = ContextAttention(config, *args, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As `ContextAttention.forward`: rows of a mask are own queries, its columns all keys.

        Raises ValueError for rows of sequences, whose documents the ring would cut each for itself.
        """
        if packed_seq_params is not None:
            raise ValueError("documents of sequences that are cut come as a mask")
        if attention_mask is None and query.dtype in RING:
            return super().forward(query, key, value, None, **kwargs)
        out: Tensor = self.gathered(query, key, value, attention_mask)
        return out


# Here, as the other file is for machines without Transformer Engine too.
WITH_CONTEXT[TEAttention] = TEContextAttention


def _norm(present: bool, norm: type = TENorm) -> type:
    return norm if present else IdentityOp


def _entrance(plan: FoldedSublayer, fp32_stream: bool, apart: bool) -> tuple[type, type]:
    """The norm module before a branch and the branch's first linear layer.

    The norm is the identity where it is fused or absent.
    """
    if not plan.norm_in:
        return IdentityOp, TEColumn
    if apart:
        return Norm, TEColumn
    if plan.input_scale != 1.0 or (plan.residual_from_norm and fp32_stream):
        return (Norm if plan.residual_from_norm and fp32_stream else TENorm), TEColumn
    return IdentityOp, TENormColumnWithResidual if plan.residual_from_norm else TENormColumn


def te_layer_spec(
    plan: FoldedLayer,
    *,
    causal: bool = True,
    cross: bool = False,
    fp32_stream: bool = False,
    soft_cap: float | None = None,
    apart: bool = False,
) -> ModuleSpec:
    """One layer from Transformer Engine's parts.

    Arguments and result are as `model.layers.torch_spec.local_layer_spec`.
    apart: no norm is part of a linear layer, and those of the stream are PyTorch's.
    Transformer Engine's norms compute in the format of their weights.
    So where the stream is in fp32, the norms that make it are PyTorch's;
    those that only feed a branch stay.
    """
    makes_stream = Norm if fp32_stream or apart else TENorm
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    attention_norm, qkv = _entrance(plan.attention, fp32_stream, apart)
    mlp_norm, fc1 = _entrance(plan.mlp, fp32_stream, apart)
    submodules = DepthLayerSubmodules(
        input_layernorm=attention_norm,
        self_attention=ModuleSpec(
            module=LocalSelfAttention,
            params={"attn_mask_type": mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=qkv, core_attention=core_attention(TEAttention, soft_cap), linear_proj=TERow
            ),
        ),
        self_attention_branch_norm=_norm(plan.attention.norm_branch),
        self_attention_output_norm=_norm(plan.attention.norm_out, makes_stream),
        pre_mlp_layernorm=mlp_norm,
        mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=TERow)),
        mlp_branch_norm=_norm(plan.mlp.norm_branch),
        mlp_output_norm=_norm(plan.mlp.norm_out, makes_stream),
        head_norm=TENorm,
    )
    if cross:
        submodules.pre_cross_attn_layernorm = _norm(plan.cross.norm_in, makes_stream)
        submodules.cross_attention = ModuleSpec(
            module=LocalCrossAttention,
            params={"attn_mask_type": AttnMaskType.no_mask},
            submodules=CrossAttentionSubmodules(
                linear_q=TEColumn, linear_kv=TEColumn, core_attention=TEAttention, linear_proj=TERow
            ),
        )
        submodules.cross_attention_branch_norm = _norm(plan.cross.norm_branch)
        submodules.cross_attention_output_norm = _norm(plan.cross.norm_out, makes_stream)
    return ModuleSpec(module=DepthLayer, params={"plan": plan}, submodules=submodules)

"""Layer specifications: the same layer, other parts."""

from __future__ import annotations

from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from model.depth.folded import FoldedLayer
from model.layers.capped import core_attention
from model.layers.layer import DepthLayer, DepthLayerSubmodules
from model.layers.torch_parts import (
    ColumnLinear,
    LocalCrossAttention,
    LocalMLP,
    LocalSelfAttention,
    Norm,
    RowLinear,
    SdpaAttention,
)


def _norm(present: bool) -> type:
    return Norm if present else IdentityOp


def local_layer_spec(
    plan: FoldedLayer,
    *,
    causal: bool = True,
    cross: bool = False,
    fp32_stream: bool = False,
    soft_cap: float | None = None,
) -> ModuleSpec:
    """One layer from PyTorch parts.

    plan: the layer's coefficients; causal: mask of the self-attention; cross: with cross-attention.
    fp32_stream: the stream is in fp32 and the weights are not; these parts are the same for both.
    soft_cap: of attention's scores.
    """
    submodules = DepthLayerSubmodules(
        input_layernorm=_norm(plan.attention.norm_in),
        self_attention=ModuleSpec(
            module=LocalSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.padding},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnLinear,
                core_attention=core_attention(SdpaAttention, soft_cap),
                linear_proj=RowLinear,
            ),
        ),
        self_attention_branch_norm=_norm(plan.attention.norm_branch),
        self_attention_output_norm=_norm(plan.attention.norm_out),
        pre_mlp_layernorm=_norm(plan.mlp.norm_in),
        mlp=LocalMLP,
        mlp_branch_norm=_norm(plan.mlp.norm_branch),
        mlp_output_norm=_norm(plan.mlp.norm_out),
        head_norm=Norm,
    )
    if cross:
        submodules.pre_cross_attn_layernorm = _norm(plan.cross.norm_in)
        submodules.cross_attention = ModuleSpec(
            module=LocalCrossAttention,
            params={"attn_mask_type": AttnMaskType.padding},
            submodules=CrossAttentionSubmodules(
                linear_q=ColumnLinear,
                linear_kv=ColumnLinear,
                core_attention=SdpaAttention,
                linear_proj=RowLinear,
            ),
        )
        submodules.cross_attention_branch_norm = _norm(plan.cross.norm_branch)
        submodules.cross_attention_output_norm = _norm(plan.cross.norm_out)
    return ModuleSpec(module=DepthLayer, params={"plan": plan}, submodules=submodules)

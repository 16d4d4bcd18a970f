"""What of a sublayer a fold touches, by our names without the layer's."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from model.config import ModelConfig
from model.depth.plan import DepthPlan
from model.families.family import Stack
from model.parameters.table import SOURCE_EMBEDDING


class Part(NamedTuple):
    """One kind of sublayer."""

    entrance: str
    """The norm before it."""
    first: str
    """The linear layer that reads the stream. Keys and values of cross-attention do not."""
    last: str
    """The linear layer whose output joins the stream."""
    exit: str
    """The norm on the sum."""
    branch: str
    """The norm on what the sublayer adds."""


PARTS = {
    "attention": Part(
        "input_layernorm",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "self_attention_output_norm",
        "self_attention_branch_norm",
    ),
    "cross": Part(
        "pre_cross_attn_layernorm",
        "cross_attention.linear_q",
        "cross_attention.linear_proj",
        "cross_attention_output_norm",
        "cross_attention_branch_norm",
    ),
    "mlp": Part(
        "pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2", "mlp_output_norm", "mlp_branch_norm"
    ),
}
LEAVES = ("weight", "bias")


class Tables(NamedTuple):
    """The modules that make the stream of a stack."""

    words: str
    positions: str
    norm: str


def tables(config: ModelConfig, stack: Stack) -> Tables:
    """Those of a stack, of which it may share the words."""
    own = SOURCE_EMBEDDING if config.blueprint.crossed and not stack.cross else "embedding"
    shared = "embedding" if config.share_embeddings else own
    return Tables(f"{shared}.word_embeddings", f"{own}.position_embeddings", f"{own}.norm")


def opened(plan: DepthPlan) -> DepthPlan:
    """The inverse of `DepthPlan.closed` for a stack that norms after its last layer only."""
    *below, top = plan.layers
    if plan.final_norm or not top.mlp.norm_out or any(layer.mlp.norm_out for layer in below):
        return plan
    top = replace(top, mlp=replace(top.mlp, norm_out=False))
    return replace(plan, layers=(*below, top), final_norm=True)

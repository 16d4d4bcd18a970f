"""GPT: a decoder, which reads its sequence from left to right (Radford et al. 2019)."""

from __future__ import annotations

from model.families.family import WINDOWS, Family, Mask, Stack

GPT = Family(
    name="gpt",
    summary="a decoder under a causal mask",
    stacks=(Stack("decoder", Mask.CAUSAL),),
    settings=("logit_bias", "embedding_norm", *WINDOWS),
)

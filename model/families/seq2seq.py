"""Encoder-decoders: a decoder that also reads what an encoder makes (Vaswani et al. 2017)."""

from __future__ import annotations

from model.families.family import Family, Mask, Stack

SEQ2SEQ = Family(
    name="seq2seq",
    summary="an encoder, and a decoder that attends to what it gives",
    stacks=(Stack("encoder", Mask.BIDIRECTIONAL), Stack("decoder", Mask.CAUSAL, cross=True)),
    positions=("learned", "sinusoidal", "rotary", "none"),
    settings=(
        "embedding_norm",
        "logit_bias",
        "encoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_hidden_size",
        "max_source_positions",
        "share_embeddings",
    ),
)

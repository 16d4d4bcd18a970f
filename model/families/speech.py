"""Speech: an encoder of filterbanks, and a decoder that writes what it hears (Wang et al. 2020)."""

from __future__ import annotations

from model.families.family import Family, Mask, Sinusoid, Stack

SPEECH = Family(
    name="speech",
    summary="an encoder of recordings, and a decoder that attends to what it gives",
    stacks=(Stack("encoder", Mask.BIDIRECTIONAL), Stack("decoder", Mask.CAUSAL, cross=True)),
    positions=("learned", "sinusoidal", "rotary", "none"),
    inputs="frames",
    # Those of Speech2Text, whose position 0 is that of a padding token and 1 of none.
    sinusoid=Sinusoid(first=2, slowest_last=True),
    settings=(
        "speech",
        "embedding_norm",
        "logit_bias",
        "encoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_hidden_size",
        "max_source_positions",
    ),
)

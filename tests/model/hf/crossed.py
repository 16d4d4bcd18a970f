"""Tiny encoder-decoders, and what both sides of a comparison are asked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.config import ModelConfig
from model.hf.proof import Inputs, proof_inputs
from model.weights.bases import sinusoid_scale
from tests.model.hf.tiny import LOGIT_SCALE, POSITIONS, make_config, shape_of
from tests.reference import seq2seq

SOURCE = 18
"""Positions of the encoder where nothing else is said."""


def make_crossed(scheme: str = "pre_ln", **given: object) -> ModelConfig:
    """4 layers on 3 of other sizes, with as many positions on both sides."""
    base: dict[str, object] = {
        "family": "seq2seq",
        "num_layers": 4,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_hidden_size": 40,
        "max_position_embeddings": POSITIONS,
        "max_source_positions": POSITIONS,
    }
    return make_config(scheme, **{**base, **given})


def asked(config: ModelConfig) -> Inputs:
    """Padded on both sides, in different rows."""
    return proof_inputs(config, POSITIONS, None, SOURCE)


def published(
    config: ModelConfig,
    weights: dict[str, Tensor],
    logit_scale: float = LOGIT_SCALE,
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Tensor]:
    """Logits [b, s, padded vocabulary] by the reference, which shares no code with the product."""
    encoder, decoder = (shape_of(config.of(stack), logit_scale) for stack in config.blueprint.stacks)
    fixed = sinusoid_scale(config) if config.position == "sinusoidal" else None
    model = seq2seq.Model(encoder, decoder, config.share_embeddings, config.embedding_norm, fixed)
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}

    def logits(tokens: Tensor, source: Tensor, source_keep: Tensor, keep: Tensor) -> Tensor:
        places = [torch.arange(side.shape[1]).expand_as(side) for side in (source, tokens)]
        batch = seq2seq.Batch(source, tokens, source_keep, torch.ones_like(tokens), *places)
        found = seq2seq.logits(cast, model, batch)
        return found + cast["output_layer.bias"] if config.logit_bias else found

    return logits

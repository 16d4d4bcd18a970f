"""Tiny models with weights that hide nothing.

Gains, biases and the order of rows in every matrix are random.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters.table import parameter_table
from tests.reference import encoder, gpt

POSITIONS = 24
LOGIT_SCALE = 0.3


def make_config(scheme: str = "pre_ln", **given: object) -> ModelConfig:
    """5 layers, so that mix_ln has both kinds; 101 tokens padded to 112."""
    base: dict[str, object] = {
        "num_layers": 5,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "vocab_size": 101,
        "vocab_multiple": 16,
    }
    return ModelConfig(scheme=scheme, **{**base, **given})


def make_encoder(scheme: str = "pre_ln", **given: object) -> ModelConfig:
    """The same as an encoder with all that stock classes have."""
    return make_config(scheme, **{"family": "bert", "token_types": 2, **given})


def make_weights(config: ModelConfig, seed: int = 0, positions: int = POSITIONS) -> dict[str, Tensor]:
    """Stream and logits of about unit size."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for row in parameter_table(config, positions=positions):
        name, shape = row.name, row.shape
        r = torch.randn(shape, generator=generator)
        if "norm" in name:
            out[name] = 1 + 0.2 * r if name.endswith("weight") else 0.2 * r
        elif name.endswith(("bias", "gate")):
            out[name] = 0.2 * r
        else:
            out[name] = r * (0.7 if "embeddings" in name else shape[1] ** -0.5)
    return out


def reference(
    config: ModelConfig,
    weights: dict[str, Tensor],
    logit_scale: float = LOGIT_SCALE,
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Tensor]:
    """Token ids [b, s] -> logits [b, s, padded vocabulary] by the references of the depth schemes.

    They share no code with the product. An encoder's also takes `keep` and `types`.
    """
    shape = gpt.Shape(
        scheme=config.scheme,
        num_layers=config.num_layers,
        heads=config.num_attention_heads,
        groups=config.num_query_groups,
        activation=config.activation,
        normalization=config.normalization,
        eps=config.norm_epsilon,
        position=config.position,
        rotary_base=float(config.rotary_base),
        first_norm=config.first_norm,
        window=config.window,
        global_every=config.global_every,
        local_base=config.rotary_base_local,
        logit_scale=logit_scale,
        options=config.scheme_options,
    )
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if config.stack.causal:
        return lambda tokens: gpt.logits(cast, shape, tokens)
    model = encoder.Encoder(shape, config.token_types, config.embedding_norm, config.plain_head)
    return lambda tokens, keep=None, types=None: encoder.logits(
        cast, model, encoder.Batch(tokens, keep, types=types)
    )


def make_tokens(config: ModelConfig, batch: int = 2, length: int = 16, seed: int = 1) -> Tensor:
    return torch.randint(
        0, config.vocab_size or 0, (batch, length), generator=torch.Generator().manual_seed(seed)
    )

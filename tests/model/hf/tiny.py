"""Tiny models with weights that hide nothing.

Gains, biases and the order of rows in every matrix are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters.table import parameter_table
from tests.reference import encoder, gpt, parts, rotary

if TYPE_CHECKING:
    from model.hf.result import Export

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
    for row in parameter_table(config, positions=positions, source_positions=positions):
        name, shape = row.name, row.shape
        r = torch.randn(shape, generator=generator)
        if "norm" in name:
            out[name] = 1 + 0.2 * r if name.endswith("weight") else 0.2 * r
        elif name.endswith(("bias", "gate")):
            out[name] = 0.2 * r
        else:
            out[name] = r * (0.7 if "embeddings" in name else shape[1] ** -0.5)
    return out


def export_tiny(weights: dict[str, Tensor], config: ModelConfig, folder: Path, **given: Any) -> Export:
    """An export with a tiny model's factor and length, without a tokenizer unless one is given."""
    from model.hf.export import export

    always = {"logit_scale": LOGIT_SCALE, "tokenizer": None, "seq_length": POSITIONS}
    return export(weights, config, folder, **{**always, **given})


def reference(
    config: ModelConfig,
    weights: dict[str, Tensor],
    logit_scale: float = LOGIT_SCALE,
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Tensor]:
    """Token ids [b, s] -> logits [b, s, padded vocabulary] by the references of the depth schemes.

    They share no code with the product. An encoder's also takes `keep` and `types`.
    """
    shape = shape_of(config, logit_scale)
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if config.stack.causal:
        return lambda tokens: gpt.logits(cast, shape, tokens)
    model = encoder.Encoder(shape, config.token_types, config.embedding_norm, config.plain_head)
    return lambda tokens, keep=None, types=None: encoder.logits(
        cast, model, encoder.Batch(tokens, keep, types=types)
    )


def shape_of(config: ModelConfig, logit_scale: float) -> gpt.Shape:
    """A model as the references describe it."""
    frequencies, turned_scale = rotation(config)
    return gpt.Shape(
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
        embedding_norm=config.embedding_norm,
        window=config.window,
        global_every=config.global_every,
        global_first=config.global_first,
        local_base=config.rotary_base_local,
        frequencies=frequencies,
        turned_scale=turned_scale,
        qk_norm=config.attention.qk_norm,
        soft_cap=config.attention.soft_cap,
        logit_soft_cap=config.logit_soft_cap,
        logit_scale=logit_scale,
        options=config.scheme_options,
    )


def rotation(config: ModelConfig) -> tuple[Tensor | None, float]:
    """Frequencies of the first entries of a head in fp64, None for plain ones; their factor."""
    given, base = config.rotary, float(config.rotary_base)
    width, original = int(config.kv_channels * given.share), given.original_positions or 0
    if given.scaling == "linear":
        return rotary.linear(base, width, given.factor), 1.0
    if given.scaling == "llama3":
        limits = given.low_frequency, given.high_frequency
        return rotary.llama3(base, width, given.factor, original, *limits), 1.0
    if given.scaling == "yarn":
        betas = given.beta_fast, given.beta_slow
        turning = rotary.yarn(base, width, given.factor, original, betas, whole=given.truncate)
        return turning, given.attention_factor or 1 + math.log(given.factor) / 10
    return (None if given.share == 1 else parts.plain_frequencies(base, width)), 1.0


def make_tokens(config: ModelConfig, batch: int = 2, length: int = 16, seed: int = 1) -> Tensor:
    return torch.randint(
        0, config.vocab_size or 0, (batch, length), generator=torch.Generator().manual_seed(seed)
    )

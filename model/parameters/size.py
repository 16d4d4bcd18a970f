"""How large a model is, from its configuration alone: every parameter's canonical name and shape, and counts by part."""

from __future__ import annotations

import math
from collections.abc import Iterator

from model.config import ModelConfig
from model.depth.scheme import SCHEMES, Layer
from model.errors import UserError

Shapes = Iterator[tuple[str, tuple[int, ...]]]
PARTS = ("word_embeddings", "position_embeddings", "attention", "mlp", "norms", "output_layer")


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Yields (canonical name, whole-model shape) of every parameter, each tied or replicated one once, in the order of the stream.

    Linear weights are [out, in]. Raises UserError while model.vocab_size, or model.max_position_embeddings with learned positions, is unknown.
    """
    scheme = SCHEMES[config.scheme]
    hidden = config.hidden_size
    if config.vocab_size is None:
        raise UserError(
            "model.vocab_size is not known: set it, or prepare the data, whose tokenizer gives it"
        )
    yield "embedding.word_embeddings.weight", (config.padded_vocab, hidden)
    if config.position == "learned":
        if config.max_position_embeddings is None:
            raise UserError("model.max_position_embeddings is not known: set it, or take data.seq_length")
        yield "embedding.position_embeddings.weight", (config.max_position_embeddings, hidden)
    if scheme.embedding_norm:
        yield from _norm(config, "embedding.norm")
    for index, layer in enumerate(scheme.plan(config.num_layers, config.scheme_options)):
        yield from _layer(config, layer, f"decoder.layers.{index}.")
    if scheme.final_norm:
        yield from _norm(config, "decoder.final_layernorm")
    if not config.tie_embeddings:
        yield "output_layer.weight", (config.padded_vocab, hidden)


def parameter_count(config: ModelConfig) -> dict[str, int]:
    """Parameters by part (`PARTS`; absent parts count 0), then `total`. Tied embeddings count once, padding rows count. Raises as `parameter_shapes`."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in parameter_shapes(config):
        counts[_part(name)] += math.prod(shape)
    return {**counts, "total": sum(counts.values())}


def _layer(config: ModelConfig, layer: Layer, prefix: str) -> Shapes:
    hidden, ffn, width = config.hidden_size, config.ffn_size, config.kv_channels
    heads, groups = config.num_attention_heads, config.groups
    yield from _norm(config, prefix + "input_layernorm", layer.attention.norm_in)
    yield from _linear(config, prefix + "self_attention.linear_qkv", (heads + 2 * groups) * width, hidden)
    yield from _linear(config, prefix + "self_attention.linear_proj", hidden, heads * width)
    yield from _norm(config, prefix + "self_attention_branch_norm", layer.attention.norm_branch)
    yield from _norm(config, prefix + "self_attention_output_norm", layer.attention.norm_out)
    yield from _norm(config, prefix + "pre_mlp_layernorm", layer.mlp.norm_in)
    yield from _linear(config, prefix + "mlp.linear_fc1", ffn * (2 if config.gated else 1), hidden)
    yield from _linear(config, prefix + "mlp.linear_fc2", hidden, ffn)
    yield from _norm(config, prefix + "mlp_branch_norm", layer.mlp.norm_branch)
    yield from _norm(config, prefix + "mlp_output_norm", layer.mlp.norm_out)


def _norm(config: ModelConfig, name: str, present: bool = True) -> Shapes:
    if present:
        yield f"{name}.weight", (config.hidden_size,)
        if config.normalization == "layernorm":
            yield f"{name}.bias", (config.hidden_size,)


def _linear(config: ModelConfig, name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)
    if config.bias:
        yield f"{name}.bias", (out,)


def _part(name: str) -> str:
    if "norm" in name:
        return "norms"
    for part in ("word_embeddings", "position_embeddings", "output_layer"):
        if part in name:
            return part
    return "attention" if ".self_attention." in name else "mlp"

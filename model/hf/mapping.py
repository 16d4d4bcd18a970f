"""Names and shapes, canonical <-> Hugging Face, as data: one table a target, read both ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf import crossed_names
from model.hf.crossed_names import NamedRule
from model.parameters.blocks import Blocks
from model.parameters.table import Role, Row, parameter_table, qkv_blocks
from model.weights.bases import sinusoid_scale

Target = Literal[
    "gpt2", "llama", "opt", "bert", "megatron-bert", "eurobert", "modernbert", "mistral",
    "bart", "mbart", "blenderbot", "marian", "qwen2", "qwen3", "gpt_neox", "vit", "fathom",
]  # fmt: skip
# Every norm of OPT's is a torch.nn.LayerNorm without an epsilon in config.json, so that torch's
# default is the only one.
OPT_EPSILON = 1e-5
NORM_LAYER_GAIN = OPT_EPSILON**0.5


@dataclass(frozen=True)
class Conversion:
    """How one canonical tensor becomes one or several Hugging Face tensors, and back.

    Both ways work on weights and, where there are any, on biases.
    """

    to_hf: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
    from_hf: Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


def _split_qkv(t: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """Rows [group: q.., k, v] -> (Q, K, V) with heads in order.

    Hugging Face's attention divides its scores by sqrt(head width). What our scores are multiplied
    by besides becomes a factor on the queries, which their rotation commutes with.
    """
    q, k, v = qkv_blocks(config).split(t)
    return q * _query_factor(config), k, v


def _join_qkv(parts: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
    q, k, v = parts
    return qkv_blocks(config).join((q / _query_factor(config), k, v))


def _normed_queries(config: ModelConfig) -> bool:
    return "q" in config.depth_plan().layers[-1].attention.inner


def _query_factor(config: ModelConfig) -> float:
    """Of the projection: where queries are normed after it, their norm has the factor."""
    return 1.0 if config.score_scale == 1 or _normed_queries(config) else config.score_scale


def _flip(t: Tensor) -> Tensor:
    """Conv1D keeps weights [in, out]; biases stay."""
    return t.T if t.dim() == 2 else t


def _split_fused(parts: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
    return _join_qkv(_flip(parts[0]).chunk(3), config)


def _pad_rows(t: Tensor, config: ModelConfig) -> Tensor:
    return torch.cat((t, t.new_zeros(config.padded_vocab - len(t), *t.shape[1:])))


def _lead_rows(t: Tensor, config: ModelConfig) -> Tensor:
    return torch.cat((t.new_zeros(2, *t.shape[1:]), t))


def _split_rows(parts: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
    return _join_qkv(parts[0].chunk(3), config)


def _kv_blocks(config: ModelConfig) -> Blocks:
    return Blocks((("k", 1), ("v", 1)), config.num_attention_heads)


PLAIN = Conversion(lambda t, config: (t,), lambda parts, config: parts[0])
CONV1D = Conversion(lambda t, config: (_flip(t),), lambda parts, config: _flip(parts[0]))
QKV = Conversion(_split_qkv, _join_qkv)
QUERY_NORM = Conversion(
    lambda t, config: (t * config.score_scale,), lambda parts, config: parts[0] / config.score_scale
)
QKV_CONV1D = Conversion(lambda t, config: (_flip(torch.cat(_split_qkv(t, config))),), _split_fused)
QKV_FUSED = Conversion(
    lambda t, config: (qkv_blocks(config).join(_split_qkv(t, config)),),
    lambda parts, config: _join_qkv(qkv_blocks(config).split(parts[0]), config),
)
QKV_ROWS = Conversion(lambda t, config: (torch.cat(_split_qkv(t, config)),), _split_rows)
GATE_UP = Conversion(lambda t, config: tuple(t.chunk(2)), lambda parts, config: torch.cat(parts))
VOCABULARY = Conversion(
    lambda t, config: (t[: config.vocab_size],), lambda parts, config: _pad_rows(parts[0], config)
)
# OPT looks positions up from row 2 on; row 1 is read at padding only, row 0 never.
POSITIONS_FROM_2 = Conversion(lambda t, config: (_lead_rows(t, config),), lambda parts, config: parts[0][2:])

# Rows [head: k, v] of cross-attention.
KV = Conversion(
    lambda t, config: _kv_blocks(config).split(t), lambda parts, config: _kv_blocks(config).join(parts)
)
BIAS_ROW = Conversion(
    lambda t, config: (t[None, : config.vocab_size],), lambda parts, config: _pad_rows(parts[0][0], config)
)

FINAL_BIAS: tuple[Target, ...] = ("bart", "mbart", "blenderbot", "marian")
"""Encoder-decoders of transformers: their bias on the logits is a row, and always there."""


def _kernel(t: Tensor, config: ModelConfig) -> Tensor:
    """The map of patches as a convolution; grey images become colours of three equal channels."""
    image = config.image
    assert image is not None
    if t.dim() == 1:
        return t
    kernel = t.reshape(-1, image.channels, image.patch, image.patch)
    return kernel.expand(-1, COLOURS, -1, -1) / COLOURS if image.channels == 1 else kernel


def _from_kernel(parts: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
    assert config.image is not None
    whole = parts[0]
    if whole.dim() == 4 and config.image.channels == 1:
        whole = whole.sum(1)
    return whole.reshape(len(whole), -1) if whole.dim() > 1 else whole


COLOURS = 3
"""Channels that transformers reads every image with."""
PATCHES = Conversion(lambda t, config: (_kernel(t, config),), _from_kernel)
BATCHED = Conversion(lambda t, config: (t[None],), lambda parts, config: parts[0][0])

LOGIT_BIAS_HF: dict[Target, str] = {
    "bert": "cls.predictions.bias",
    "megatron-bert": "cls.predictions.bias",
    "eurobert": "lm_head.bias",
    "modernbert": "decoder.bias",
    **dict.fromkeys(FINAL_BIAS, "final_logits_bias"),
    "vit": "classifier.bias",
    "fathom": "logit_bias",
}
"""What the bias on the logits is called by the targets that have one."""

# Module name -> (Hugging Face module names, conversion). {i} is the 0-based layer.
# Rules that a model has no tensor for are not used.
Rule = tuple[tuple[str, ...], Conversion]
_L, _E = "decoder.layers.{i}.", "encoder.layers.{i}."
_GPT2: dict[str, Rule] = {
    "embedding.word_embeddings": (("transformer.wte",), VOCABULARY),
    "embedding.position_embeddings": (("transformer.wpe",), PLAIN),
    _L + "input_layernorm": (("transformer.h.{i}.ln_1",), PLAIN),
    _L + "self_attention.linear_qkv": (("transformer.h.{i}.attn.c_attn",), QKV_CONV1D),
    _L + "self_attention.linear_proj": (("transformer.h.{i}.attn.c_proj",), CONV1D),
    _L + "pre_mlp_layernorm": (("transformer.h.{i}.ln_2",), PLAIN),
    _L + "mlp.linear_fc1": (("transformer.h.{i}.mlp.c_fc",), CONV1D),
    _L + "mlp.linear_fc2": (("transformer.h.{i}.mlp.c_proj",), CONV1D),
    "decoder.final_layernorm": (("transformer.ln_f",), PLAIN),
    "output_layer": (("lm_head",), VOCABULARY),
}
_LLAMA: dict[str, Rule] = {
    "embedding.word_embeddings": (("model.embed_tokens",), VOCABULARY),
    _L + "input_layernorm": (("model.layers.{i}.input_layernorm",), PLAIN),
    _L + "self_attention.linear_qkv": (
        tuple("model.layers.{i}.self_attn." + p + "_proj" for p in "qkv"),
        QKV,
    ),
    _L + "self_attention.linear_proj": (("model.layers.{i}.self_attn.o_proj",), PLAIN),
    _L + "pre_mlp_layernorm": (("model.layers.{i}.post_attention_layernorm",), PLAIN),
    _L + "mlp.linear_fc1": (("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"), GATE_UP),
    _L + "mlp.linear_fc2": (("model.layers.{i}.mlp.down_proj",), PLAIN),
    "decoder.final_layernorm": (("model.norm",), PLAIN),
    "output_layer": (("lm_head",), VOCABULARY),
}
_QWEN3: dict[str, Rule] = {
    **_LLAMA,
    _L + "self_attention.q_layernorm": (("model.layers.{i}.self_attn.q_norm",), QUERY_NORM),
    _L + "self_attention.k_layernorm": (("model.layers.{i}.self_attn.k_norm",), PLAIN),
}
_X = "gpt_neox.layers.{i}."
_GPT_NEOX: dict[str, Rule] = {
    "embedding.word_embeddings": (("gpt_neox.embed_in",), VOCABULARY),
    _L + "input_layernorm": ((_X + "input_layernorm",), PLAIN),
    _L + "self_attention.linear_qkv": ((_X + "attention.query_key_value",), QKV_FUSED),
    _L + "self_attention.linear_proj": ((_X + "attention.dense",), PLAIN),
    _L + "pre_mlp_layernorm": ((_X + "post_attention_layernorm",), PLAIN),
    _L + "mlp.linear_fc1": ((_X + "mlp.dense_h_to_4h",), PLAIN),
    _L + "mlp.linear_fc2": ((_X + "mlp.dense_4h_to_h",), PLAIN),
    "decoder.final_layernorm": (("gpt_neox.final_layer_norm",), PLAIN),
    "output_layer": (("embed_out",), VOCABULARY),
}
_D = "model.decoder.layers.{i}."
# Post-LN: the norm between the sublayers may be written as the first one's norm_out or as the
# second one's norm_in, see `model/hf/folding/post_ln.py`.
_OPT: dict[str, Rule] = {
    "embedding.word_embeddings": (("model.decoder.embed_tokens",), VOCABULARY),
    "embedding.position_embeddings": (("model.decoder.embed_positions",), POSITIONS_FROM_2),
    _L + "self_attention.linear_qkv": (tuple(_D + "self_attn." + p + "_proj" for p in "qkv"), QKV),
    _L + "self_attention.linear_proj": ((_D + "self_attn.out_proj",), PLAIN),
    _L + "self_attention_output_norm": ((_D + "self_attn_layer_norm",), PLAIN),
    _L + "pre_mlp_layernorm": ((_D + "self_attn_layer_norm",), PLAIN),
    _L + "mlp.linear_fc1": ((_D + "fc1",), PLAIN),
    _L + "mlp.linear_fc2": ((_D + "fc2",), PLAIN),
    _L + "mlp_output_norm": ((_D + "final_layer_norm",), PLAIN),
    "output_layer": (("lm_head",), VOCABULARY),
}
_B, _T = "bert.encoder.layer.{i}.", "cls.predictions.transform."
# What BERT and Megatron's BERT, which differ in where their norms stand, have in common.
_BERTS: dict[str, Rule] = {
    "embedding.word_embeddings": (("bert.embeddings.word_embeddings",), VOCABULARY),
    "embedding.position_embeddings": (("bert.embeddings.position_embeddings",), PLAIN),
    "embedding.tokentype_embeddings": (("bert.embeddings.token_type_embeddings",), PLAIN),
    _E + "self_attention.linear_qkv": (
        tuple(_B + "attention.self." + p for p in ("query", "key", "value")),
        QKV,
    ),
    _E + "self_attention.linear_proj": ((_B + "attention.output.dense",), PLAIN),
    _E + "mlp.linear_fc1": ((_B + "intermediate.dense",), PLAIN),
    _E + "mlp.linear_fc2": ((_B + "output.dense",), PLAIN),
    "head.dense": ((_T + "dense",), PLAIN),
    "head.norm": ((_T + "LayerNorm",), PLAIN),
}
_BERT: dict[str, Rule] = {
    **_BERTS,
    "embedding.norm": (("bert.embeddings.LayerNorm",), PLAIN),
    _E + "self_attention_output_norm": ((_B + "attention.output.LayerNorm",), PLAIN),
    _E + "pre_mlp_layernorm": ((_B + "attention.output.LayerNorm",), PLAIN),
    _E + "mlp_output_norm": ((_B + "output.LayerNorm",), PLAIN),
}
_MEGATRON_BERT: dict[str, Rule] = {
    **_BERTS,
    _E + "input_layernorm": ((_B + "attention.ln",), PLAIN),
    _E + "pre_mlp_layernorm": ((_B + "ln",), PLAIN),
    "encoder.final_layernorm": (("bert.encoder.ln",), PLAIN),
}
# A Llama whose tokens see all others.
_EUROBERT: dict[str, Rule] = {
    module.replace("decoder.", "encoder.", 1): rule for module, rule in _LLAMA.items()
}
_N = "model.layers.{i}."
_MODERNBERT: dict[str, Rule] = {
    "embedding.word_embeddings": (("model.embeddings.tok_embeddings",), VOCABULARY),
    "embedding.norm": (("model.embeddings.norm",), PLAIN),
    _E + "input_layernorm": ((_N + "attn_norm",), PLAIN),
    _E + "self_attention.linear_qkv": ((_N + "attn.Wqkv",), QKV_ROWS),
    _E + "self_attention.linear_proj": ((_N + "attn.Wo",), PLAIN),
    _E + "pre_mlp_layernorm": ((_N + "mlp_norm",), PLAIN),
    _E + "mlp.linear_fc1": ((_N + "mlp.Wi",), PLAIN),
    _E + "mlp.linear_fc2": ((_N + "mlp.Wo",), PLAIN),
    "encoder.final_layernorm": (("model.final_norm",), PLAIN),
    "head.dense": (("head.dense",), PLAIN),
    "head.norm": (("head.norm",), PLAIN),
    "output_layer": (("decoder",), VOCABULARY),
}
_V = "vit.encoder.layer.{i}."
_VIT: dict[str, Rule] = {
    "embedding.patches": (("vit.embeddings.patch_embeddings.projection",), PATCHES),
    _E + "input_layernorm": ((_V + "layernorm_before",), PLAIN),
    _E + "self_attention.linear_qkv": (
        tuple(_V + "attention.attention." + p for p in ("query", "key", "value")),
        QKV,
    ),
    _E + "self_attention.linear_proj": ((_V + "attention.output.dense",), PLAIN),
    _E + "pre_mlp_layernorm": ((_V + "layernorm_after",), PLAIN),
    _E + "mlp.linear_fc1": ((_V + "intermediate.dense",), PLAIN),
    _E + "mlp.linear_fc2": ((_V + "output.dense",), PLAIN),
    "encoder.final_layernorm": (("vit.layernorm",), PLAIN),
    "output_layer": (("classifier",), VOCABULARY),
}
BARE: dict[Target, dict[str, Rule]] = {
    "vit": {
        "embedding.class_token": (("vit.embeddings.cls_token",), BATCHED),
        "embedding.position_embeddings": (("vit.embeddings.position_embeddings",), BATCHED),
    }
}
"""Tensors that stand by themselves there, without a module."""
_A, _M = "model.layers.{i}.attention.", "model.layers.{i}.mlp."
_FATHOM_LAYER: dict[str, Rule] = {
    "input_layernorm": ((_A + "norm_in",), PLAIN),
    "self_attention.linear_qkv": (tuple(_A + "branch." + p + "_proj" for p in "qkv"), QKV),
    "self_attention.q_layernorm": ((_A + "branch.q_norm",), QUERY_NORM),
    **{f"self_attention.{p}_layernorm": ((_A + f"branch.{p}_norm",), PLAIN) for p in "kv"},
    "self_attention.linear_proj": ((_A + "branch.o_proj",), PLAIN),
    "self_attention.linear_proj.input_norm": ((_A + "branch.o_norm",), PLAIN),
    "mlp.linear_fc2.input_norm": ((_M + "branch.down_norm",), PLAIN),
    "self_attention_branch_norm": ((_A + "norm_branch",), PLAIN),
    "self_attention_output_norm": ((_A + "norm_out",), PLAIN),
    "pre_mlp_layernorm": ((_M + "norm_in",), PLAIN),
    "mlp.linear_fc1": ((_M + "branch.gate_proj", _M + "branch.up_proj"), GATE_UP),
    "mlp.linear_fc2": ((_M + "branch.down_proj",), PLAIN),
    "mlp_branch_norm": ((_M + "norm_branch",), PLAIN),
    "mlp_output_norm": ((_M + "norm_out",), PLAIN),
    "gpas": (("model.layers.{i}.gate",), PLAIN),
}
_FATHOM: dict[str, Rule] = {
    "embedding.word_embeddings": (("model.embed_tokens",), VOCABULARY),
    "embedding.position_embeddings": (("model.embed_positions",), PLAIN),
    "embedding.tokentype_embeddings": (("model.embed_types",), PLAIN),
    "embedding.norm": (("model.embed_norm",), PLAIN),
    **{stack + module: rule for stack in (_L, _E) for module, rule in _FATHOM_LAYER.items()},
    "decoder.final_layernorm": (("model.norm",), PLAIN),
    "encoder.final_layernorm": (("model.norm",), PLAIN),
    "head.dense": (("head.dense",), PLAIN),
    "head.norm": (("head.norm",), PLAIN),
    "output_layer": (("lm_head",), VOCABULARY),
}
_CONVERSIONS = {
    "plain": PLAIN,
    "qkv": QKV,
    "kv": KV,
    "gate_up": GATE_UP,
    "vocabulary": VOCABULARY,
    "positions_from_2": POSITIONS_FROM_2,
}


def _rules(named: Mapping[str, NamedRule]) -> dict[str, Rule]:
    return {module: (names, _CONVERSIONS[key]) for module, (names, key) in named.items()}


_FATHOM_CROSSED, _MARIAN_APART = _rules(crossed_names.FATHOM), _rules(crossed_names.MARIAN_APART)
TABLES: dict[Target, dict[str, Rule]] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "opt": _OPT,
    "bert": _BERT,
    "megatron-bert": _MEGATRON_BERT,
    "eurobert": _EUROBERT,
    "modernbert": _MODERNBERT,
    "mistral": _LLAMA,
    "bart": _rules(crossed_names.BART),
    "mbart": _rules(crossed_names.MBART),
    "blenderbot": _rules(crossed_names.BLENDERBOT),
    "marian": _rules(crossed_names.MARIAN),
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "gpt_neox": _GPT_NEOX,
    "vit": _VIT,
    "fathom": _FATHOM,
}
_CROSSED_SHOWN: dict[str, bool | int | str] = {"bias": True, "logit_bias": True, "position": "learned"}
SHOWN: dict[Target, dict[str, bool | int | str]] = {
    "gpt2": {"bias": True},
    "bert": {"bias": True, "token_types": 2},
    "megatron-bert": {"bias": True, "token_types": 2},
    **dict.fromkeys(FINAL_BIAS, _CROSSED_SHOWN),
    "marian": {"bias": True, "logit_bias": True},
    "vit": {"bias": True, "logit_bias": True},
}
"""What a target always has; zeros where a model has no such tensors, or its fixed positions."""


@dataclass(frozen=True)
class Entry:
    """One canonical tensor and the Hugging Face tensors made of it."""

    canonical: str
    shape: tuple[int, ...]
    hf: tuple[str, ...]
    conversion: Conversion
    constant: float | Tensor | None = None
    """The model has no such tensor, and the target wants this number, or these, there."""

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of the Hugging Face tensors."""
        return {
            name: tuple(t.shape)
            for name, t in zip(
                self.hf, self.conversion.to_hf(torch.empty(self.shape, device="meta"), config), strict=True
            )
        }


def last_norm(config: ModelConfig) -> str:
    """The norm before the output projection: the head's, or that after the stack."""
    return "head.norm" if config.head_transform else config.blueprint.stacks[-1].final_norm


def norm_layers(target: Target, config: ModelConfig) -> tuple[bool, bool]:
    """Whether the norm (after the embedding, after the stack) becomes a layer of its own.

    That is an OPT layer whose branches are zero.
    """
    if target != "opt":
        return False, False
    plan = config.depth_plan()
    return plan.embedding_norm, plan.final_norm


def _table(target: Target, config: ModelConfig) -> dict[str, Rule]:
    if target == "marian" and not config.share_embeddings:
        return _MARIAN_APART
    return _FATHOM_CROSSED if target == "fathom" and config.blueprint.crossed else TABLES[target]


def _shown(target: Target, config: ModelConfig) -> ModelConfig:
    """The model with what the target always has."""
    shown = SHOWN.get(target, {})
    if shown.get("position") == "learned" and config.position == "sinusoidal":
        # One length for both tables, which hold what the model computes.
        longest = max(config.max_position_embeddings or 0, config.max_source_positions or 0)
        shown = {**shown, "max_position_embeddings": longest, "max_source_positions": longest}
    return config.model_copy(update=shown)


def _within(conversion: Conversion, own: ModelConfig) -> Conversion:
    """The conversion with the sizes of one of several stacks."""
    return Conversion(
        lambda t, config: conversion.to_hf(t, own), lambda parts, config: conversion.from_hf(parts, own)
    )


def entries(
    target: Target, config: ModelConfig, positions: int, source_positions: int | None = None
) -> list[Entry]:
    """The whole mapping of one model to one target.

    positions, source_positions: rows of a learned position table, and of an encoder's under it.
    Raises KeyError for a tensor the target has no home for; `folding.obstacle` tells beforehand.
    """
    lengths = {"positions": positions, "source_positions": source_positions}
    own = {row.name: row for row in parameter_table(config, **lengths)}
    shown, table = _shown(target, config), _table(target, config)
    stacks = config.blueprint.stacks
    sizes = {stack.name: config.of(stack) for stack in stacks[:-1]}
    first, last = norm_layers(target, config)
    places = {"embedding.norm": 0} if first else {}
    if last:
        places[stacks[-1].final_norm] = config.num_layers + first
    result = []
    for row in parameter_table(shown, **lengths):
        constant = None if row.name in own else _constant(row, config)
        if row.role is Role.LOGIT_BIAS:
            conversion = BIAS_ROW if target in FINAL_BIAS else VOCABULARY
            result.append(Entry(row.name, row.shape, (LOGIT_BIAS_HF[target],), conversion, constant))
            continue
        if row.module in BARE.get(target, {}):
            names, conversion = BARE[target][row.module]
            result.append(Entry(row.name, row.shape, names, conversion))
            continue
        module, number = _rule_name(row), "" if row.layer is None else str((row.index or 0) + first)
        if row.module in places:
            if row.leaf == "weight":
                result += _norm_layer(own.values(), places[row.module])
            module, number = _L + "mlp_output_norm", str(places[row.module])
        names, conversion = table[module]
        if conversion is GATE_UP and not config.gated:
            names, conversion = names[1:], PLAIN
        if row.stack in sizes:
            conversion = _within(conversion, sizes[row.stack])
        hf = tuple(f"{name.replace('{i}', number)}.{row.leaf}" for name in names)
        result.append(Entry(row.name, row.shape, hf, conversion, constant))
    return result


def _constant(row: Row, config: ModelConfig) -> float | Tensor:
    """What a target has in a tensor that the model lacks."""
    if row.role is not Role.POSITION or config.position != "sinusoidal":
        return 0.0
    return fixed_positions(config, row.shape[0]).float()


def fixed_positions(config: ModelConfig, rows: int) -> Tensor:
    """[rows, h] in fp64: sines of all frequencies, then cosines, as they are added to words."""
    width = config.hidden_size
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), frequencies)
    return sinusoid_scale(config) * torch.cat((angles.sin(), angles.cos()), dim=-1)


def _rule_name(row: Row) -> str:
    return row.module if row.layer is None else f"{row.stack}.layers.{{i}}.{row.module}"


def _norm_layer(rows: Iterable[Row], number: int) -> list[Entry]:
    """What makes OPT's layer `number` a norm, but for its last norm, which is the norm itself.

    See `model/hf/folding/post_ln.py`.
    """
    result = []
    for row in rows:
        if row.layer != 0 or row.module == "mlp_output_norm":
            continue
        names, conversion = TABLES["opt"][_rule_name(row)]
        hf = tuple(f"{name.replace('{i}', str(number))}.{row.leaf}" for name in names)
        constant = NORM_LAYER_GAIN if row.role is Role.NORM_GAIN else 0.0
        result.append(Entry(f"norm layer {number}: {row.name}", row.shape, hf, conversion, constant))
    return result


def check_weights(weights: Iterable[str], names: Collection[str]) -> None:
    """Raises UserError naming the first canonical tensor that is missing, or is not the model's."""
    given = set(weights)
    for name in names:
        if name not in given:
            raise UserError(
                f"the weights have no tensor {name!r}, which this model configuration needs: "
                "is this the checkpoint's own configuration?"
            )
    for name in sorted(given - set(names)):
        raise UserError(
            f"the weights have a tensor {name!r}, which this model configuration has no place for: "
            "is this the checkpoint's own configuration?"
        )


class CanonicalWeights(Mapping[str, Tensor]):
    """Hugging Face tensors seen under canonical names; each is converted when it is read.

    Names and shapes are those of the entries.
    Reading raises UserError for values that fp32 does not hold.
    """

    def __init__(self, hf: Mapping[str, Tensor], todo: Iterable[Entry], config: ModelConfig) -> None:
        self._hf, self._config = hf, config
        self._entries = {entry.canonical: entry for entry in todo}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        parts = tuple(_in_fp32(part, self._hf[part]) for part in entry.hf)
        return entry.conversion.from_hf(parts, self._config).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _in_fp32(name: str, tensor: Tensor) -> Tensor:
    """The same numbers in fp32. Raises UserError where they are not finite, or not the same."""
    if not tensor.isfinite().all():
        raise UserError(f"{name} has values that are not finite (NaN or infinity): the model is damaged")
    single = tensor.float()
    if tensor.dtype == torch.float64 and not torch.equal(single.double(), tensor):
        raise UserError(
            f"{name} is stored in float64, with values that float32 does not hold exactly: "
            "round it with transformers (model.float().save_pretrained) if that is what you want"
        )
    return single

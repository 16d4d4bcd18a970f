"""How one canonical tensor becomes one or several of Hugging Face's, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters.blocks import Blocks
from model.parameters.table import qkv_blocks
from model.speech import KERNEL
from model.weights.bases import sinusoid_scale

Target = Literal[
    "gpt2", "llama", "opt", "bert", "megatron-bert", "eurobert", "modernbert", "mistral",
    "bart", "mbart", "blenderbot", "marian", "qwen2", "qwen3", "gpt_neox", "gemma", "gemma2",
    "gemma3_text", "vit", "speech_to_text", "fathom",
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
    return "q" in config.stack_plan(config.blueprint.stacks[-1]).layers[-1].attention.inner


def _query_factor(config: ModelConfig) -> float:
    """Of the projection: where queries are normed after it, their norm has the factor."""
    return 1.0 if config.score_scale == 1 or _normed_queries(config) else config.score_scale


def _plus(t: Tensor, number: int) -> Tensor:
    """The sum, rounded once."""
    return (t.double() + number).to(t.dtype)


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
# Of a norm on queries, or of what alone makes them.
QUERY = Conversion(
    lambda t, config: (t * config.score_scale,), lambda parts, config: parts[0] / config.score_scale
)
QKV_CONV1D = Conversion(lambda t, config: (_flip(torch.cat(_split_qkv(t, config))),), _split_fused)
QKV_FUSED = Conversion(
    lambda t, config: (qkv_blocks(config).join(_split_qkv(t, config)),),
    lambda parts, config: _join_qkv(qkv_blocks(config).split(parts[0]), config),
)
QKV_ROWS = Conversion(lambda t, config: (torch.cat(_split_qkv(t, config)),), _split_rows)
# Gemma's norms multiply by one more than their tensor says.
GAIN = Conversion(lambda t, config: (_plus(t, -1),), lambda parts, config: _plus(parts[0], 1))
QUERY_GAIN = Conversion(
    lambda t, config: (_plus(t * config.score_scale, -1),),
    lambda parts, config: _plus(parts[0], 1) / config.score_scale,
)
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

GEMMAS: tuple[Target, ...] = ("gemma", "gemma2", "gemma3_text")
"""Decoders whose words are multiplied by the root of the width, and whose norms by 1 + gain."""
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


def _windows(t: Tensor, config: ModelConfig) -> Tensor:
    """A convolution over frames with its kernel as a dimension; a bias stays."""
    return t.reshape(len(t), -1, KERNEL) if t.dim() == 2 else t


def _last_windows(t: Tensor, config: ModelConfig) -> Tensor:
    """The same of the last one, whose results get the unit in which positions have a factor of 1.

    They are the first half of its rows; the others open and close the gate.
    """
    values, gates = t.chunk(2)
    return _windows(torch.cat((values / sinusoid_scale(config), gates)), config)


def _from_last_windows(parts: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
    values, gates = parts[0].chunk(2)
    whole = torch.cat((values * sinusoid_scale(config), gates))
    return whole.flatten(1) if whole.dim() == 3 else whole


COLOURS = 3
"""Channels that transformers reads every image with."""
PATCHES = Conversion(lambda t, config: (_kernel(t, config),), _from_kernel)
BATCHED = Conversion(lambda t, config: (t[None],), lambda parts, config: parts[0][0])
FRAMES = Conversion(
    lambda t, config: (_windows(t, config),),
    lambda parts, config: parts[0].flatten(1) if parts[0].dim() == 3 else parts[0],
)
LAST_FRAMES = Conversion(lambda t, config: (_last_windows(t, config),), _from_last_windows)

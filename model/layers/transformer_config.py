"""Configuration -> Megatron-core's, which every layer is built from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from model.config import ModelConfig
from model.norms import NORMS


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (So et al. 2021), any shape."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016), as GPT-2 has it; any shape."""
    return F.gelu(x, approximate="tanh")


Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
    "swiglu": F.silu,
}


def transformer_config(
    model: ModelConfig, *, dtype: torch.dtype = torch.float32, on_cpu: bool = True, **parallel: object
) -> TransformerConfig:
    """Megatron-core's configuration of a model; with several stacks, of the last one's sizes.

    parallel: its fields about degrees and communication, given by the topology,
        and about precision.
    """
    after = 0 if model.window is None or model.stack.causal else model.window
    stream = torch.float32 if parallel.get("fp32_residual_connection") else dtype
    return TransformerConfig(
        num_layers=model.total_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.groups,
        kv_channels=model.kv_channels,
        softmax_scale=_softmax_scale(model),
        window_size=None if model.window is None else (model.window, after),
        window_attn_skip_freq=None
        if model.global_every is None
        else [int(model.is_local(layer)) for layer in range(model.num_layers)],
        ffn_hidden_size=model.ffn_size,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.norm_epsilon,
        normalization=NORMS[model.normalization].core,
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated,
        add_bias_linear=model.bias,
        add_qkv_bias=model.attention.qkv_bias,
        # Values come from `model/weights/init.py`, by global name, after the build.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        params_dtype=dtype,
        pipeline_dtype=stream,  # what stages send each other
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],  # the whole layer; by its default it says the same and warns of it
        **parallel,
    )


def stack_config(config: TransformerConfig, sizes: ModelConfig) -> TransformerConfig:
    """The configuration with the sizes of one stack (`ModelConfig.of`), for its layers."""
    own = copy.copy(config)
    own.num_attention_heads, own.num_query_groups = sizes.num_attention_heads, sizes.groups
    own.kv_channels, own.ffn_hidden_size = sizes.kv_channels, sizes.ffn_size
    own.softmax_scale = _softmax_scale(sizes)
    return own


def _softmax_scale(sizes: ModelConfig) -> float | None:
    """None is 1 / sqrt(kv_channels) everywhere."""
    scores = sizes.score_scale
    return None if scores == 1 else scores / math.sqrt(sizes.kv_channels)

"""config.json, read with a reason for everything that is not ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import UserError
from model.hf.configs import STOCK_INIT, fathom_fields
from model.hf.folding.pre_ln import LLAMA_ACTIVATIONS, UNGATED_ACTIVATIONS, Fold
from model.hf.mapping import OPT_EPSILON, Target

# Three spellings of one function; files of GPT-2 have the first.
_SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
}


def read_config(data: Mapping[str, Any]) -> tuple[Target, ModelConfig, int, float]:
    """(target whose names the files use, configuration, positions, logit scale) of a config.json.

    Raises UserError with the first reason why it is not one of our models.
    """
    kind = data.get("model_type")
    readers = {
        "gpt2": _read_gpt2,
        "llama": _read_llama,
        "mistral": _read_llama,
        "opt": _read_opt,
        "fathom": _read_fathom,
    }
    if kind not in readers:
        raise UserError(f"model_type={kind!r} cannot be imported; supported: {', '.join(readers)}")
    return readers[kind](data)


def _refuse(kind: str, problems: list[tuple[bool, str]]) -> None:
    for present, problem in problems:
        if present:
            raise UserError(f"this {kind} model cannot be imported: {problem}")


def _activation(kind: str, name: str, table: Mapping[str, str]) -> str:
    name = _SAME_ACTIVATION.get(name, name)
    for ours, theirs in table.items():
        if theirs == name:
            return ours
    raise UserError(
        f"this {kind} model cannot be imported: its activation is {name}; supported: {', '.join(table.values())}"
    )


def _read_gpt2(data: Mapping[str, Any]) -> tuple[Target, ModelConfig, int, float]:
    dropouts = data.get("resid_pdrop", 0.1), data.get("embd_pdrop", 0.1)
    _refuse(
        "gpt2",
        [
            (
                not data.get("scale_attn_weights", True),
                "its attention is not scaled by 1/sqrt(head width) (scale_attn_weights=false)",
            ),
            (
                data.get("scale_attn_by_inverse_layer_idx", False),
                "its attention is scaled by the layer number (scale_attn_by_inverse_layer_idx)",
            ),
            (data.get("add_cross_attention", False), "it has cross-attention"),
            (
                dropouts[0] != dropouts[1],
                f"resid_pdrop={dropouts[0]} and embd_pdrop={dropouts[1]} differ, hidden_dropout is one number; make them equal in config.json",
            ),
        ],
    )
    positions = int(data.get("n_positions", 1024))
    hidden = int(data.get("n_embd", 768))
    config = ModelConfig(
        scheme="pre_ln",
        init=STOCK_INIT,
        num_layers=data.get("n_layer", 12),
        hidden_size=hidden,
        num_attention_heads=data.get("n_head", 12),
        ffn_hidden_size=data.get("n_inner") or 4 * hidden,
        vocab_size=data.get("vocab_size", 50257),
        max_position_embeddings=positions,
        norm_epsilon=data.get("layer_norm_epsilon", 1e-5),
        activation=_activation("gpt2", data.get("activation_function", "gelu_new"), UNGATED_ACTIVATIONS),  # type: ignore[arg-type]
        tie_embeddings=data.get("tie_word_embeddings", True),
        hidden_dropout=dropouts[0],
        attention_dropout=data.get("attn_pdrop", 0.1),
    )
    return "gpt2", config, positions, 1.0


def _read_llama(data: Mapping[str, Any]) -> tuple[Target, ModelConfig, int, float]:
    kind = str(data["model_type"])
    rope = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
    base = rope.get("rope_theta", data.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    biases = bool(data.get("attention_bias", False)), bool(data.get("mlp_bias", False))
    heads, hidden = data.get("num_attention_heads", 32), data.get("hidden_size", 4096)
    _refuse(
        kind,
        [
            (rope_type != "default", f"its rotary embedding is scaled (rope_type={rope_type})"),
            (
                float(rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0))) != 1.0,
                "only a part of each head is rotated (partial_rotary_factor)",
            ),
            (
                not isinstance(base, (int, float)) or base != int(base),
                f"its rotary base {base} is not a whole number",
            ),
            (
                data.get("sliding_window", 4096 if kind == "mistral" else None) is not None,
                f"it has sliding-window attention ({data.get('sliding_window', 4096)} tokens)",
            ),
            (
                biases[0] != biases[1],
                f"attention_bias={biases[0]} and mlp_bias={biases[1]} differ, bias is one switch here",
            ),
        ],
    )
    positions = int(data.get("max_position_embeddings", 2048))
    config = ModelConfig(
        scheme="pre_ln",
        init=STOCK_INIT,
        num_layers=data.get("num_hidden_layers", 32),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or hidden // heads,
        ffn_hidden_size=data.get("intermediate_size", 11008),
        vocab_size=data.get("vocab_size", 32000),
        max_position_embeddings=positions,
        normalization="rmsnorm",
        norm_epsilon=data.get("rms_norm_eps", 1e-6),
        activation=_activation(kind, data.get("hidden_act", "silu"), LLAMA_ACTIVATIONS),  # type: ignore[arg-type]
        position="rotary",
        rotary_base=int(base),
        tie_embeddings=data.get("tie_word_embeddings", False),
        bias=biases[0],
        attention_dropout=data.get("attention_dropout") or 0.0,
    )
    return "llama", config, positions, 1.0


def _read_opt(data: Mapping[str, Any]) -> tuple[Target, ModelConfig, int, float]:
    hidden, layerdrop = data.get("hidden_size", 768), data.get("layerdrop", 0.0)
    width = data.get("word_embed_proj_dim") or hidden
    _refuse(
        "opt",
        [
            (
                data.get("do_layer_norm_before", True),
                "its norms stand before the sublayers (do_layer_norm_before=true); only post-LN ones are read",
            ),
            (
                width != hidden,
                f"its embeddings are {width} wide and projected to hidden_size={hidden} (word_embed_proj_dim)",
            ),
            (
                not data.get("layer_norm_elementwise_affine", True),
                "its norms have no gain and bias (layer_norm_elementwise_affine=false)",
            ),
            (
                layerdrop != 0,
                f"it leaves layers out in training (layerdrop={layerdrop}); set layerdrop to 0 in config.json",
            ),
        ],
    )
    positions = int(data.get("max_position_embeddings", 2048))
    config = ModelConfig(
        scheme="post_ln",
        init=STOCK_INIT,
        num_layers=data.get("num_hidden_layers", 12),
        hidden_size=hidden,
        num_attention_heads=data.get("num_attention_heads", 12),
        ffn_hidden_size=data.get("ffn_dim", 3072),
        vocab_size=data.get("vocab_size", 50272),
        max_position_embeddings=positions,
        norm_epsilon=OPT_EPSILON,
        activation=_activation("opt", data.get("activation_function", "relu"), UNGATED_ACTIVATIONS),  # type: ignore[arg-type]
        tie_embeddings=data.get("tie_word_embeddings", True),
        bias=data.get("enable_bias", True),
        hidden_dropout=data.get("dropout", 0.1),
        attention_dropout=data.get("attention_dropout", 0.0),
    )
    return "opt", config, positions, 1.0


def _read_fathom(data: Mapping[str, Any]) -> tuple[Target, ModelConfig, int, float]:
    from model.hf.configuration_fathom import FathomConfig

    if not data.get("pretraining"):
        raise UserError("this fathom model cannot be imported: its config.json has no `pretraining` section")
    config = ModelConfig(**data["pretraining"])
    positions, logit_scale = int(data["max_position_embeddings"]), float(data["logit_scale"])
    # The section must describe the very model that config.json makes transformers build.
    built = fathom_fields(config, Fold({}, config.norm_epsilon), positions, logit_scale)
    del built["auto_map"], built["pretraining"]
    given = FathomConfig(**data)
    for key, expected in {
        **built,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
    }.items():
        if getattr(given, key) != expected:
            raise UserError(
                f"this fathom model cannot be imported: config.json has {key}={getattr(given, key)!r}, but its `pretraining` section gives {expected!r}"
            )
    return "fathom", config, positions, logit_scale

"""config.json, both ways: written for a target, and read with a reason for everything that is not ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import InitConfig, ModelConfig
from model.depth.plan import Plan
from model.depth.scheme import Sublayer
from model.errors import UserError
from model.hf.folding.pre_ln import LLAMA_ACTIVATIONS, UNGATED_ACTIVATIONS, Fold
from model.hf.mapping import OPT_EPSILON, Target, norm_layers

ARCHITECTURES: dict[Target, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "opt": "OPTForCausalLM",
    "fathom": "FathomForCausalLM",
}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Ids that begin and end a text and fill up, by their names in config.json."""
# The initialisation under which tied embeddings have no factor on the logits, as in all stock architectures.
STOCK_INIT = InitConfig(base="normal")
# Three spellings of one function; files of GPT-2 have the first.
_SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
}


def depth_plan(plan: Plan) -> list[dict[str, Any]]:
    """A plan as runs of equal layers, each sublayer with what differs from the defaults only."""
    defaults = dataclasses.asdict(Sublayer())
    runs: list[dict[str, Any]] = []
    for layer in plan.layers:
        pair = {
            kind: {k: v for k, v in dataclasses.asdict(sublayer).items() if v != defaults[k]}
            for kind, sublayer in (("attention", layer.attention), ("mlp", layer.mlp))
        }
        if runs and all(runs[-1][kind] == pair[kind] for kind in pair):
            runs[-1]["layers"] += 1
        else:
            runs.append({"layers": 1, **pair})
    return runs


def write_config(
    target: Target,
    config: ModelConfig,
    fold: Fold,
    *,
    positions: int,
    logit_scale: float,
    dtype: str,
    special: Mapping[str, Any],
) -> dict[str, Any]:
    """Contents of config.json. special: an id, or None where it is not known, for each of SPECIAL."""
    common = {
        "architectures": [ARCHITECTURES[target]],
        "model_type": target,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        # transformers 5 reads the first, older ones the second.
        "dtype": dtype,
        "torch_dtype": dtype,
        **special,
    }
    return {
        **common,
        **{"gpt2": _gpt2, "llama": _llama, "opt": _opt, "fathom": _fathom}[target](
            config, fold, positions, logit_scale
        ),
    }


def _gpt2(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, Any]:
    return {
        "n_positions": positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_size,
        "activation_function": UNGATED_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": fold.epsilon,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
    }


def _llama(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, Any]:
    return {
        "max_position_embeddings": positions,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.kv_channels,
        "hidden_act": LLAMA_ACTIVATIONS[config.activation],
        "rms_norm_eps": fold.epsilon,
        # transformers 5 reads the first, older ones the second, and each falls back to 10000 without it.
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rotary_base)},
        "rope_theta": float(config.rotary_base),
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.attention_dropout,
    }


def _opt(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, Any]:
    return {
        "max_position_embeddings": positions,
        "hidden_size": config.hidden_size,
        "word_embed_proj_dim": config.hidden_size,
        "ffn_dim": config.ffn_size,
        "num_hidden_layers": config.num_layers + sum(norm_layers("opt", Plan.of(config))),
        "num_attention_heads": config.num_attention_heads,
        "activation_function": UNGATED_ACTIVATIONS[config.activation],
        "do_layer_norm_before": False,
        "layer_norm_elementwise_affine": True,
        "enable_bias": config.bias,
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "layerdrop": 0.0,
    }


def _fathom(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, Any]:
    plan = Plan.of(config)
    return {
        "auto_map": {
            "AutoConfig": "configuration_fathom.FathomConfig",
            "AutoModelForCausalLM": "modeling_fathom.FathomForCausalLM",
        },
        "max_position_embeddings": positions,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.kv_channels,
        "activation": config.activation,
        "normalization": config.normalization,
        "norm_epsilon": fold.epsilon,
        "position": config.position,
        "rotary_base": float(config.rotary_base),
        "bias": config.bias,
        "embedding_norm": plan.embedding_norm,
        "final_norm": plan.final_norm,
        "logit_scale": logit_scale,
        "depth_plan": depth_plan(plan),
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        # Not read by the model: what pretraining called it, for the way back.
        "pretraining": config.model_dump(mode="json", exclude_unset=True),
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
    built = _fathom(config, Fold({}, config.norm_epsilon), positions, logit_scale)
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

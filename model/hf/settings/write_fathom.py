"""What config.json of our own class says, whose depth scheme is data."""

from __future__ import annotations

import dataclasses
from typing import TypedDict

import torch

from model.config import ModelConfig
from model.depth.plan import DepthPlan
from model.depth.sublayer import Sublayer
from model.hf.folding.pre_ln import Fold
from model.hf.names.conversions import COLOURS
from model.hf.packaging import packaging
from model.rotary import frequencies, magnitude
from model.weights.bases import sinusoid_scale


class _Gate(TypedDict, total=False):
    gate: bool
    """The stream is scaled by a learned factor; left out where it is not."""


class _Parts(_Gate, total=False):
    cross: dict[str, object]
    """Of cross-attention; left out where there is none."""


class LayerRun(_Parts):
    """Equal layers in a row."""

    layers: int
    attention: dict[str, object]
    """What differs from the defaults of a sublayer."""
    mlp: dict[str, object]


def depth_plan(plan: DepthPlan) -> list[LayerRun]:
    """A plan as runs of equal layers."""
    runs: list[LayerRun] = []
    for layer in plan.layers:
        run: LayerRun = {"layers": 1, "attention": _changed(layer.attention), "mlp": _changed(layer.mlp)}
        if plan.cross:
            run["cross"] = _changed(layer.cross)
        if layer.gate:
            run["gate"] = True
        if runs and {**runs[-1], "layers": 1} == run:
            runs[-1]["layers"] += 1
        else:
            runs.append(run)
    return runs


def _changed(sublayer: Sublayer) -> dict[str, object]:
    defaults = dataclasses.asdict(Sublayer())
    return {key: value for key, value in dataclasses.asdict(sublayer).items() if value != defaults[key]}


def sizes(config: ModelConfig, positions: int) -> dict[str, object]:
    """By the names that most classes have for them."""
    return {
        "max_position_embeddings": positions,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
    }


def _own_rotary(config: ModelConfig) -> dict[str, object]:
    scaled = config.rotary.scaling != "none"
    return {
        "rotary_share": config.rotary.share,
        "rotary_frequencies": frequencies(config, dtype=torch.float64).tolist() if scaled else None,
        "rotary_factor": magnitude(config),
    }


def _encoder_fields(config: ModelConfig) -> dict[str, object]:
    """What the class `fathom` is told of an encoder under a decoder."""
    if not config.blueprint.crossed:
        return {}
    first = config.blueprint.stacks[0]
    own = config.of(first)
    fixed, form = config.position == "sinusoidal", config.blueprint.sinusoid
    return {
        "is_encoder_decoder": True,
        "sinusoid_scale": sinusoid_scale(config) if fixed else 1.0,
        "sinusoid": {"first": form.first, "steps": form.steps(config.hidden_size)},
        "encoder_depth_plan": depth_plan(config.stack_plan(first)),
        "encoder_layers": own.num_layers,
        "encoder_attention_heads": own.num_attention_heads,
        "encoder_head_dim": own.kv_channels,
        "encoder_intermediate_size": own.ffn_size,
        "max_source_positions": config.max_source_positions,
        "share_embeddings": config.share_embeddings,
    }


def _image_fields(config: ModelConfig) -> dict[str, object]:
    """What the class `fathom` is told of images."""
    image = config.image
    if image is None:
        return {}
    return {
        "image_size": [image.height, image.columns],
        "patch_size": image.patch,
        "num_channels": COLOURS if image.channels == 1 else image.channels,
        "image_pooling": image.pool,
    }


def _speech_fields(config: ModelConfig) -> dict[str, object]:
    """What the class `fathom` is told of frames."""
    if config.speech is None:
        return {}
    return {"speech": {"filters": config.speech.filters, "channels": config.speech.channels}}


def fathom_fields(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    """What config.json of the class `fathom` says beside what all targets say."""
    last = config.blueprint.stacks[-1]
    plan = config.stack_plan(last)
    return {
        "auto_map": dict(packaging(config).auto_map),
        **sizes(config, positions),
        "num_key_value_heads": config.groups,
        "head_dim": config.kv_channels,
        "activation": config.activation,
        "normalization": config.normalization,
        "norm_epsilon": fold.epsilon,
        "position": config.position,
        "rotary_base": float(config.rotary_base),
        "window": config.window,
        "global_every": config.global_every,
        "global_first": config.global_first,
        "rotary_base_local": config.rotary_base_local,
        **_own_rotary(config),
        "bias": config.bias,
        "qkv_bias": config.attention.qkv_bias,
        "attention_soft_cap": config.attention.soft_cap,
        "logit_soft_cap": config.logit_soft_cap,
        "embedding_norm": plan.embedding_norm,
        "final_norm": plan.final_norm,
        "logit_scale": logit_scale,
        "logit_bias": config.logit_bias,
        "plain_head": config.plain_head,
        "depth_plan": depth_plan(plan),
        "causal": last.causal,
        "type_vocab_size": config.token_types,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        **_encoder_fields(config),
        **_image_fields(config),
        **_speech_fields(config),
        # Not read by the model: what pretraining called it, for the way back.
        "pretraining": config.model_dump(mode="json", exclude_unset=True),
    }

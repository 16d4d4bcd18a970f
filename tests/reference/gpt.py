"""A decoder-only language model in plain PyTorch under every depth scheme.

Each scheme is coded from its published equation.
Parameters are a dict from topology-free name to whole tensor.
A name is `decoder.layers.3.mlp.linear_fc1.weight`, for example.
The fused query-key-value matrix has, for every group, the rows of its query heads, of its key and
of its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import (
    b2t,
    deepnorm,
    deepscalelm,
    gpas,
    hybridnorm,
    keel,
    layernorm_scaling,
    mix_ln,
    peri_ln,
    post_ln,
    pre_ln,
    spannorm,
    subln,
)
from tests.reference.parts import Drop, Options, Weights, capped, keep, norm

Parameters = Mapping[str, Tensor]

# Names of norms by where they stand.
# Before attention, before the feed-forward, on a branch, or after the layer's last sum.
PRE = {"input_layernorm": "ln1", "pre_mlp_layernorm": "ln2"}
POST = {"pre_mlp_layernorm": "ln1", "mlp_output_norm": "ln2"}
PERI = {**PRE, "self_attention_branch_norm": "ln1_out", "mlp_branch_norm": "ln2_out"}
KEEL = {**PRE, "self_attention_output_norm": "ln1_out", "mlp_output_norm": "ln2_out"}
KEEL_FIRST = {**PRE, "mlp_output_norm": "ln2_out"}
HYBRID = {
    "pre_mlp_layernorm": "ln2",
    **{f"self_attention.{role}_layernorm": f"n{role}" for role in ("q", "k", "v")},
}
SUBLN = {
    **PRE,
    "self_attention.linear_proj.input_norm": "no",
    "mlp.linear_fc2.input_norm": "nfc2",
}
ALIKE: dict[str, Mapping[str, str]] = {
    "pre_ln": PRE,
    "deepscalelm_pre_ln": PRE,
    "layernorm_scaling": PRE,
    "peri_ln": PERI,
    "gpas": PRE,
    "subln": SUBLN,
}
"""Schemes other than post-norm ones whose layers have the same norms."""


def norms_of(scheme: str, index: int, total: int, options: Mapping[str, float | bool]) -> Mapping[str, str]:
    """Norms of layer `index`, from 0, of `total`: parameter's name -> name in the references."""
    if scheme == "mix_ln":
        return POST if index < int(options.get("post_fraction", 0.25) * total) else PRE
    if scheme == "keel":
        return KEEL_FIRST if index == 0 else KEEL
    if scheme == "hybridnorm":
        first = index == 0 and bool(options.get("star", False))
        return {**HYBRID, "input_layernorm": "ln1"} if first else HYBRID
    return ALIKE.get(scheme, POST)


@dataclass(frozen=True)
class Shape:
    """A model."""

    scheme: str
    num_layers: int
    heads: int
    groups: int | None = None
    activation: str = "gelu"
    normalization: str = "layernorm"
    eps: float = 1e-5
    position: str = "learned"
    rotary_base: float = 10000.0
    """Read with position="rotary"."""
    first_norm: bool = True
    """Whether a norm stands before the first attention."""
    window: int | None = None
    """How far layers see on either side; None for everything."""
    global_every: int | None = None
    """The first and every so-manieth layer after it see everything; None for no layer."""
    global_first: int = 0
    """Layers before that first one."""
    local_base: float | None = None
    """`rotary_base` of layers with a window."""
    frequencies: Tensor | None = None
    """As `Options.frequencies`."""
    turned_scale: float = 1.0
    """As `Options.turned_scale`."""
    qk_norm: bool = False
    """Norms on every head's queries and keys."""
    soft_cap: float | None = None
    """Of scores."""
    logit_soft_cap: float | None = None
    logit_scale: float = 1.0
    options: Mapping[str, float | bool] = field(default_factory=dict)
    """Of the scheme; missing ones have the published value."""
    embedding_norm: bool | None = None
    """None: as the scheme has it."""
    drop: Drop = keep
    drop_attention: Drop = keep


def layer_weights(parameters: Parameters, index: int, shape: Shape, norms: Mapping[str, str]) -> Weights:
    """One layer's weights under the names of `parts`.

    norms: from the parameter's name to the reference's name of each norm of the layer.
    """
    prefix = f"decoder.layers.{index}."
    weights: Weights = {}
    if shape.window is not None and not (
        shape.global_every and (index - shape.global_first) % shape.global_every == 0
    ):
        weights["local"] = torch.tensor(True)
    for name, own in norms.items():
        if index == 0 and own == "ln1" and not shape.first_norm:
            weights["ln1_left_out"] = torch.tensor(True)
            continue
        weights[own] = parameters[f"{prefix}{name}.weight"]
        if f"{prefix}{name}.bias" in parameters:
            weights[own + "_b"] = parameters[f"{prefix}{name}.bias"]
    if f"{prefix}gpas.gate" in parameters:
        weights["gate"] = parameters[f"{prefix}gpas.gate"]
    matrices = {"self_attention.linear_proj": "o", "mlp.linear_fc1": "fc1", "mlp.linear_fc2": "fc2"}
    for kind, mark in (("weight", ""), ("bias", "b")):
        for name, own in matrices.items():
            if f"{prefix}{name}.{kind}" in parameters:
                weights[mark + own] = parameters[f"{prefix}{name}.{kind}"]
        if f"{prefix}self_attention.linear_qkv.{kind}" not in parameters:
            continue
        fused = parameters[f"{prefix}self_attention.linear_qkv.{kind}"]
        groups = shape.groups or shape.heads
        per_group = shape.heads // groups
        rows = fused.reshape(groups, per_group + 2, -1, *fused.shape[1:])
        weights[mark + "q"] = rows[:, :per_group].flatten(0, 2)
        weights[mark + "k"] = rows[:, per_group].flatten(0, 1)
        weights[mark + "v"] = rows[:, per_group + 1].flatten(0, 1)
    return weights


def _layers(parameters: Parameters, shape: Shape) -> list[Weights]:
    found = []
    for index in range(shape.num_layers):
        norms = dict(norms_of(shape.scheme, index, shape.num_layers, shape.options))
        if shape.qk_norm:
            norms |= {f"self_attention.{role}_layernorm": f"n{role}" for role in "qk"}
        found.append(layer_weights(parameters, index, shape, norms))
    return found


@dataclass(frozen=True)
class Family:
    """A scheme around and inside the stack."""

    embedding_norm: bool
    """Whether a norm stands on the embedding."""
    final_norm: bool
    """Whether a norm stands after the stack."""
    run: Callable[[Parameters, Shape, Tensor, Options, list[Tensor] | None], Tensor]
    """The stack itself."""


def _deepscale(shape: Shape) -> dict[str, float]:
    return {"k": float(shape.options.get("k", 2.0)), "alpha": float(shape.options.get("alpha", 1.0))}


FAMILIES: dict[str, Family] = {
    "pre_ln": Family(False, True, lambda w, s, x, o, t: pre_ln.stack(x, _layers(w, s), o, trace=t)),
    "post_ln": Family(False, False, lambda w, s, x, o, t: post_ln.stack(x, _layers(w, s), o, trace=t)),
    "b2t": Family(False, False, lambda w, s, x, o, t: b2t.stack(x, _layers(w, s), o, trace=t)),
    "deepscalelm_pre_ln": Family(
        False,
        True,
        lambda w, s, x, o, t: deepscalelm.pre_ln_stack(x, _layers(w, s), o, **_deepscale(s), trace=t),
    ),
    "deepscalelm_post_ln": Family(
        True,
        False,
        lambda w, s, x, o, t: deepscalelm.post_ln_stack(x, _layers(w, s), o, **_deepscale(s), trace=t),
    ),
    "deepnorm": Family(False, False, lambda w, s, x, o, t: deepnorm.stack(x, _layers(w, s), o, trace=t)),
    "layernorm_scaling": Family(
        False, True, lambda w, s, x, o, t: layernorm_scaling.stack(x, _layers(w, s), o, trace=t)
    ),
    "peri_ln": Family(True, True, lambda w, s, x, o, t: peri_ln.stack(x, _layers(w, s), o, trace=t)),
    "mix_ln": Family(
        False,
        True,
        lambda w, s, x, o, t: mix_ln.stack(
            x, _layers(w, s), o, post_fraction=float(s.options.get("post_fraction", 0.25)), trace=t
        ),
    ),
    "spannorm": Family(True, False, lambda w, s, x, o, t: spannorm.stack(x, _layers(w, s), o, trace=t)),
    "gpas": Family(False, True, lambda w, s, x, o, t: gpas.stack(x, _layers(w, s), o, trace=t)),
    "hybridnorm": Family(
        False,
        True,
        lambda w, s, x, o, t: hybridnorm.stack(
            x, _layers(w, s), o, star=bool(s.options.get("star", False)), trace=t
        ),
    ),
    "subln": Family(False, True, lambda w, s, x, o, t: subln.stack(x, _layers(w, s), o, trace=t)),
    "keel": Family(
        False,
        False,
        lambda w, s, x, o, t: keel.stack(
            x, _layers(w, s), o, alpha=float(s.options.get("alpha", 0.0)) or None, trace=t
        ),
    ),
}


def logits(parameters: Parameters, shape: Shape, tokens: Tensor, trace: list[Tensor] | None = None) -> Tensor:
    """Next-token logits [batch, tokens, padded vocabulary] of token ids [batch, tokens].

    trace: gets the stream entering layer 1 and every layer's output, [batch, tokens, hidden] each.
    """
    family = FAMILIES[shape.scheme]
    options = Options(
        heads=shape.heads,
        groups=shape.groups,
        activation=shape.activation,
        norm=shape.normalization,
        eps=shape.eps,
        rotary_base=shape.rotary_base if shape.position == "rotary" else None,
        window=shape.window,
        local_base=shape.local_base,
        frequencies=shape.frequencies,
        turned_scale=shape.turned_scale,
        soft_cap=shape.soft_cap,
        drop=shape.drop,
        drop_attention=shape.drop_attention,
    )

    def outer_norm(x: Tensor, name: str) -> Tensor:
        pair = {"ln": parameters[f"{name}.weight"]}
        if f"{name}.bias" in parameters:
            pair["ln_b"] = parameters[f"{name}.bias"]
        return norm(x, pair, "ln", options)

    word = parameters["embedding.word_embeddings.weight"]
    x = word[tokens]
    if shape.position == "learned":
        x = x + parameters["embedding.position_embeddings.weight"][: tokens.shape[1]]
    x = shape.drop(x)
    if family.embedding_norm if shape.embedding_norm is None else shape.embedding_norm:
        x = outer_norm(x, "embedding.norm")
    if trace is not None:
        trace.append(x)
    x = family.run(parameters, shape, x, options, trace)
    if family.final_norm:
        x = outer_norm(x, "decoder.final_layernorm")
    scores = x * shape.logit_scale @ parameters.get("output_layer.weight", word).T
    return capped(scores, shape.logit_soft_cap)


def loss(
    parameters: Parameters, shape: Shape, tokens: Tensor, targets: Tensor, vocab_size: int | None = None
) -> Tensor:
    """Mean cross-entropy in nats.

    vocab_size: real rows; the padding above them takes no part in the softmax.
    """
    scores = logits(parameters, shape, tokens)[..., :vocab_size]
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def parameter_shapes(
    shape: Shape,
    hidden: int,
    ffn: int,
    vocab: int,
    positions: int,
    head_width: int | None = None,
    bias: bool = True,
    tied: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter. vocab: with padding."""
    family, groups, d = (
        FAMILIES[shape.scheme],
        shape.groups or shape.heads,
        head_width or hidden // shape.heads,
    )
    ln_kinds = ("weight", "bias") if shape.normalization == "layernorm" else ("weight",)
    out: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab, hidden)}
    if shape.position == "learned":
        out["embedding.position_embeddings.weight"] = (positions, hidden)
    wide = (2 if shape.activation in ("swiglu", "geglu", "geglu_tanh") else 1) * ffn
    matrices = {
        "self_attention.linear_qkv": (groups * (shape.heads // groups + 2) * d, hidden),
        "self_attention.linear_proj": (hidden, shape.heads * d),
        "mlp.linear_fc1": (wide, hidden),
        "mlp.linear_fc2": (hidden, ffn),
    }
    for index in range(shape.num_layers):
        norms = norms_of(shape.scheme, index, shape.num_layers, shape.options)
        for name in norms:
            width = d if name.endswith("_layernorm") and name.startswith("self_attention.") else hidden
            if name.endswith(".input_norm"):
                width = matrices[name.removesuffix(".input_norm")][1]
            out |= {f"decoder.layers.{index}.{name}.{kind}": (width,) for kind in ln_kinds}
        if shape.scheme == "gpas":
            out[f"decoder.layers.{index}.gpas.gate"] = (1,)
        for name, size in matrices.items():
            out[f"decoder.layers.{index}.{name}.weight"] = size
            if bias:
                out[f"decoder.layers.{index}.{name}.bias"] = size[:1]
    outer = ["embedding.norm"] * family.embedding_norm + ["decoder.final_layernorm"] * family.final_norm
    out |= {f"{name}.{kind}": (hidden,) for name in outer for kind in ln_kinds}
    if not tied:
        out["output_layer.weight"] = (vocab, hidden)
    return out

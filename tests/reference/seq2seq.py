"""An encoder-decoder in plain PyTorch, under every scheme that has a rule for cross-attention.

The encoder's layers are those of `encoder.py`, each from its published equation. The decoder's are
written here, as are masks, positions and what stands around the stacks.
Parameters are a dict from topology-free name to whole tensor, such as
`encoder.layers.3.mlp.linear_fc1.weight` and `decoder.layers.0.cross_attention.linear_kv.weight`,
whose rows are, for every head, those of its key and of its value.

    memory = encoder(word[source] + position),    with a norm where the scheme ends with one
    h = decoder(word[token] + position, memory)
    logits = scale h word^T
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import deepnorm, gpt
from tests.reference.parts import Options, Weights, attention, capped, feed_forward, norm

PRE = {"input_layernorm": "ln1", "pre_cross_attn_layernorm": "ln2", "pre_mlp_layernorm": "ln3"}
POST = {"pre_cross_attn_layernorm": "ln1", "pre_mlp_layernorm": "ln2", "mlp_output_norm": "ln3"}
PERI = {
    **PRE,
    "self_attention_branch_norm": "ln1_out",
    "cross_attention_branch_norm": "ln2_out",
    "mlp_branch_norm": "ln3_out",
}
KEEL_FIRST = {**PRE, "cross_attention_output_norm": "ln2_out", "mlp_output_norm": "ln3_out"}
KEEL = {**KEEL_FIRST, "self_attention_output_norm": "ln1_out"}
SUBLN = {**PRE, "self_attention.linear_proj.input_norm": "no", "mlp.linear_fc2.input_norm": "nfc2"}


@dataclass(frozen=True)
class Model:
    """A model."""

    encoder: gpt.Shape
    """Of its stack; the scheme and all but depth and heads are the decoder's too."""
    decoder: gpt.Shape
    shared: bool = True
    """Both stacks read one table of words."""
    embedding_norm: bool | None = None
    """Whether a norm stands on both embeddings; None leaves it to the scheme."""
    sinusoid: float | None = None
    """Factor on fixed sines and cosines; None where positions are others."""
    turns: Callable[[Tensor, int], Tensor] | None = None
    """Those fixed positions, from places and a width; None for the usual ones."""

    @property
    def embedding_normed(self) -> bool:
        given, family = self.embedding_norm, gpt.FAMILIES[self.decoder.scheme]
        return family.embedding_norm if given is None else given


@dataclass(frozen=True)
class Batch:
    """What goes in. Documents are numbers of pairs; padding has the number 0."""

    source: Tensor
    tokens: Tensor
    source_documents: Tensor
    documents: Tensor
    source_positions: Tensor
    positions: Tensor
    heard: Tensor | None = None
    """What enters the encoder, where that is no embedding of words."""


@dataclass(frozen=True)
class Place:
    """A decoder layer's place: number from 1, decoder layers, weights and the three branches."""

    number: int
    total: int
    shape: gpt.Shape
    w: Weights
    o: Options
    self_attention: Callable[[Tensor], Tensor]
    cross_attention: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]

    def branches(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Name of the norm of each branch, and the branch."""
        return [("ln1", self.self_attention), ("ln2", self.cross_attention), ("ln3", self.mlp)]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return norm(x, self.w, name, self.o)

    def option(self, name: str, default: float) -> float:
        return float(self.shape.options.get(name, default))


def _pre(x: Tensor, at: Place, lam: float = 1.0, beta: float = 1.0, inside: float = 1.0) -> Tensor:
    for name, branch in at.branches():
        plain = name == "ln2" and bool(at.shape.options.get("unscaled_cross", False))
        a, b = (1.0, 1.0) if plain else (lam, beta)
        x = a * x + b * branch(inside * at.norm(x, name))
    return x


def _post(x: Tensor, at: Place, lam: float = 1.0, beta: float = 1.0) -> Tensor:
    for name, branch in at.branches():
        plain = name == "ln2" and bool(at.shape.options.get("unscaled_cross", False))
        a, b = (1.0, 1.0) if plain else (lam, beta)
        x = at.norm(a * x + b * branch(x), name)
    return x


def _peri(x: Tensor, at: Place) -> Tensor:
    for name, branch in at.branches():
        x = x + at.norm(branch(at.norm(x, name)), f"{name}_out")
    return x


def _b2t(x: Tensor, at: Place) -> Tensor:
    h1 = at.norm(x + at.self_attention(x), "ln1")
    h2 = at.norm(h1 + at.cross_attention(h1), "ln2")
    return at.norm(x + h2 + at.mlp(h2), "ln3")


def _spannorm(x: Tensor, at: Place) -> Tensor:
    h1 = at.norm(x + at.self_attention(x), "ln1")
    h2 = at.norm(h1 + at.cross_attention(h1), "ln2")
    return at.norm(x + at.mlp(h2), "ln3")


def _keel(x: Tensor, at: Place) -> Tensor:
    highway = 1.0 if at.number == 1 else at.option("alpha", 0.0) or 3.0 * at.total
    for name, branch in at.branches():
        x = highway * x + branch(at.norm(x, name))
        if not (at.number == 1 and name == "ln1"):
            x = at.norm(x, f"{name}_out")
    return x


def _gpas(x: Tensor, at: Place) -> Tensor:
    for name, branch in at.branches():
        x = x + branch(at.norm(x, name))
        x = x - F.silu(at.w["gate"]) * x.detach()
    return x


def _deepscale(at: Place) -> tuple[float, float]:
    square = at.option("k", 2.0) / (3 * at.total) ** at.option("alpha", 1.0)
    return math.sqrt(1 - square), math.sqrt(square)


def _mix(x: Tensor, at: Place) -> Tensor:
    return _post(x, at) if _is_post(at.number, at.total, at.shape) else _pre(x, at)


def _is_post(number: int, total: int, shape: gpt.Shape) -> bool:
    return number <= math.floor(float(shape.options.get("post_fraction", 0.25)) * total)


LAYERS: Mapping[str, Callable[[Tensor, Place], Tensor]] = {
    "pre_ln": _pre,
    "post_ln": _post,
    "b2t": _b2t,
    "deepscalelm_pre_ln": lambda x, at: _pre(x, at, *_deepscale(at)),
    "deepscalelm_post_ln": lambda x, at: _post(x, at, *_deepscale(at)),
    "deepnorm": lambda x, at: _post(x, at, lam=(3 * at.total) ** 0.25),
    "layernorm_scaling": lambda x, at: _pre(x, at, inside=at.number**-0.5),
    "peri_ln": _peri,
    "mix_ln": _mix,
    "spannorm": _spannorm,
    "keel": _keel,
    "gpas": _gpas,
    "subln": _pre,
}


def norms_of(number: int, shape: gpt.Shape) -> Mapping[str, str]:
    """Norms of decoder layer `number`, from 1: parameter's name -> name in the equations above."""
    if shape.scheme == "keel":
        return KEEL_FIRST if number == 1 else KEEL
    if shape.scheme == "mix_ln":
        return POST if _is_post(number, shape.num_layers, shape) else PRE
    alike = {"peri_ln": PERI, "subln": SUBLN}
    alike |= dict.fromkeys(("post_ln", "b2t", "deepscalelm_post_ln", "deepnorm", "spannorm"), POST)
    return alike.get(shape.scheme, PRE)


def decoder_weights(parameters: gpt.Parameters, index: int, shape: gpt.Shape) -> Weights:
    """One decoder layer's weights under the names of `parts`, cross-attention's with a c before."""
    weights = gpt.layer_weights(parameters, index, shape, norms_of(index + 1, shape))
    prefix = f"decoder.layers.{index}.cross_attention."
    for kind, mark in (("weight", ""), ("bias", "b")):
        if f"{prefix}linear_q.{kind}" not in parameters:
            continue
        weights[f"c{mark}q"] = parameters[f"{prefix}linear_q.{kind}"]
        weights[f"c{mark}o"] = parameters[f"{prefix}linear_proj.{kind}"]
        both = parameters[f"{prefix}linear_kv.{kind}"]
        heads = both.reshape(shape.heads, 2, -1, *both.shape[1:])
        weights[f"c{mark}k"], weights[f"c{mark}v"] = heads[:, 0].flatten(0, 1), heads[:, 1].flatten(0, 1)
    return weights


def _outer(parameters: gpt.Parameters, x: Tensor, name: str, options: Options) -> Tensor:
    pair: Weights = {"ln": parameters[f"{name}.weight"]}
    if f"{name}.bias" in parameters:
        pair["ln_b"] = parameters[f"{name}.bias"]
    return norm(x, pair, "ln", options)


def _options(shape: gpt.Shape, positions: Tensor, hide: Tensor, *, causal: bool) -> Options:
    return Options(
        heads=shape.heads,
        activation=shape.activation,
        norm=shape.normalization,
        eps=shape.eps,
        causal=causal,
        rotary_base=shape.rotary_base if shape.position == "rotary" else None,
        frequencies=shape.frequencies,
        drop=shape.drop,
        drop_attention=shape.drop_attention,
        hide=hide,
        positions=positions,
    )


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """[..., width]: sines of all frequencies, then cosines."""
    frequencies = torch.tensor([10000 ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angles = positions[..., None].double() * frequencies
    return torch.cat((torch.sin(angles), torch.cos(angles)), dim=-1)


def _embed(
    parameters: gpt.Parameters, model: Model, ids: Tensor, positions: Tensor, module: str, options: Options
) -> Tensor:
    own = "embedding" if model.shared else module
    x = parameters[f"{own}.word_embeddings.weight"][ids]
    if model.decoder.position == "learned":
        x = x + parameters[f"{module}.position_embeddings.weight"][positions]
    if model.sinusoid is not None:
        x = x + model.sinusoid * (model.turns or sinusoids)(positions, x.shape[-1]).to(x.dtype)
    x = model.decoder.drop(x)
    return _outer(parameters, x, f"{module}.norm", options) if model.embedding_normed else x


def _other(a: Tensor, b: Tensor) -> Tensor:
    """[batch, 1, tokens of a, tokens of b]: True for tokens of different pairs."""
    return (a[:, :, None] != b[:, None, :])[:, None]


def memory(
    parameters: gpt.Parameters, model: Model, batch: Batch, trace: list[Tensor] | None = None
) -> Tensor:
    """What the encoder gives, [batch, source tokens, hidden].

    trace: gets the stream entering layer 1 and every layer's output, before a norm after the stack.
    """
    shape, hide = model.encoder, _other(batch.source_documents, batch.source_documents)
    options = _options(shape, batch.source_positions, hide, causal=False)
    if batch.heard is None:
        x = _embed(parameters, model, batch.source, batch.source_positions, "source_embedding", options)
    else:
        x = batch.heard
        if model.embedding_normed:
            x = _outer(parameters, x, "source_embedding.norm", options)
    if trace is not None:
        trace.append(x)
    layers = {
        name.replace("encoder.", "decoder.", 1): value
        for name, value in parameters.items()
        if name.startswith("encoder.")
    }
    if shape.scheme == "deepnorm":
        residual = 0.81 * (shape.num_layers**4 * model.decoder.num_layers) ** (1 / 16)
        for index in range(shape.num_layers):
            x = deepnorm.layer(x, gpt.layer_weights(layers, index, shape, gpt.POST), options, residual)
    else:
        x = gpt.FAMILIES[shape.scheme].run(layers, shape, x, options, trace)
    if not gpt.FAMILIES[shape.scheme].final_norm:
        return x
    return _outer(parameters, x, f"encoder.layers.{shape.num_layers - 1}.mlp_output_norm", options)


def hidden_states(
    parameters: gpt.Parameters,
    model: Model,
    batch: Batch,
    traces: tuple[list[Tensor], list[Tensor]] | None = None,
) -> Tensor:
    """What the output projection reads, [batch, tokens, hidden].

    traces: as `memory`'s, of the encoder and of the decoder.
    """
    shape = model.decoder
    given = memory(parameters, model, batch, None if traces is None else traces[0])
    options = _options(shape, batch.positions, _other(batch.documents, batch.documents), causal=True)
    seen = replace(options, hide=None, rotary_base=None, causal=False)
    # A padded token has no pair: what it sees is nobody's business, but it sees something.
    apart = _other(batch.documents, batch.source_documents) & (batch.documents != 0)[:, None, :, None]
    x = _embed(parameters, model, batch.tokens, batch.positions, "embedding", options)
    if traces is not None:
        traces[1].append(x)
    for index in range(shape.num_layers):
        w = decoder_weights(parameters, index, shape)

        def self_attention(u: Tensor, w: Weights = w) -> Tensor:
            return shape.drop(attention(u, w, options))

        def cross_attention(u: Tensor, w: Weights = w) -> Tensor:
            return shape.drop(attention(u, w, seen, prefix="c", memory=given, hide=apart))

        def mlp(u: Tensor, w: Weights = w) -> Tensor:
            return shape.drop(feed_forward(u, w, options))

        place = Place(index + 1, shape.num_layers, shape, w, options, self_attention, cross_attention, mlp)
        x = LAYERS[shape.scheme](x, place)
        if traces is not None:
            traces[1].append(x)
    final = gpt.FAMILIES[shape.scheme].final_norm
    return _outer(parameters, x, "decoder.final_layernorm", options) if final else x


def logits(parameters: gpt.Parameters, model: Model, batch: Batch) -> Tensor:
    """[batch, tokens, padded vocabulary]."""
    table = parameters.get("output_layer.weight", parameters["embedding.word_embeddings.weight"])
    scores = hidden_states(parameters, model, batch) * model.decoder.logit_scale @ table.T
    return capped(scores, model.decoder.logit_soft_cap)


def losses(
    parameters: gpt.Parameters, model: Model, batch: Batch, labels: Tensor, vocab_size: int | None = None
) -> Tensor:
    """Cross-entropy in nats of every position, [batch, tokens].

    vocab_size: real rows; the padding above them takes no part in the softmax.
    """
    scores = logits(parameters, model, batch)[..., :vocab_size]
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

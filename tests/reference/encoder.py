"""A bidirectional encoder with masked language modelling, under every depth scheme.

In plain PyTorch.

The layers are those of the decoder (`gpt.py`), each from its published equation, without the causal
mask. Embeddings, masks and head are written here.
Parameters are a dict from topology-free name to whole tensor.
A layer's name is `encoder.layers.3.mlp.linear_fc1.weight`, for example.

    x = word[token] (+ position[p]) (+ type[t]),    then a norm where the model has one
    h = stack(x), every token seeing every other one that is not hidden
    logits = scale Norm_head(act(W h + b)) word^T + head bias,    or a matrix of its own,
    or scale h word^T (+ bias) where the head is plain
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import gpt
from tests.reference.parts import Options, Weights, activate, capped, linear, norm

IGNORED = -100
"""Label of a position without a target."""
POINTWISE = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""The head's activation where the feed-forward's is gated."""


@dataclass(frozen=True)
class Encoder:
    """A model."""

    stack: gpt.Shape
    """Layers, norms and positions; its logit scale is that of the head."""
    token_types: int = 0
    """Rows of the segment table; 0 without one."""
    embedding_norm: bool | None = None
    """Whether a norm stands on the embedding; None leaves it to the scheme."""
    plain_head: bool = False
    """Whether the output projection reads what the stack gives."""

    @property
    def embedding_normed(self) -> bool:
        """Whether a norm stands on the embedding."""
        return (
            gpt.FAMILIES[self.stack.scheme].embedding_norm
            if self.embedding_norm is None
            else self.embedding_norm
        )


@dataclass(frozen=True)
class Batch:
    """What goes in. All tensors are [batch, tokens]."""

    tokens: Tensor
    keep: Tensor | None = None
    """1 for a token, 0 for padding, which nobody sees; None for tokens only."""
    documents: Tensor | None = None
    """Number of each token's document; tokens of different ones do not see each other."""
    positions: Tensor | None = None
    """None for 0, 1, 2 ..."""
    types: Tensor | None = None
    """Rows of the segment table; None for zeros."""

    def hidden(self) -> Tensor | None:
        """True where a key is hidden, broadcastable to [batch, heads, tokens, keys]."""
        hidden = None if self.keep is None else self.keep[:, None, None, :] == 0
        if self.documents is not None:
            other = (self.documents[:, :, None] != self.documents[:, None, :])[:, None]
            hidden = other if hidden is None else hidden | other
        return hidden


def _options(shape: gpt.Shape, batch: Batch) -> Options:
    return Options(
        heads=shape.heads,
        groups=shape.groups,
        activation=shape.activation,
        norm=shape.normalization,
        eps=shape.eps,
        causal=False,
        rotary_base=shape.rotary_base if shape.position == "rotary" else None,
        window=shape.window,
        local_base=shape.local_base,
        frequencies=shape.frequencies,
        turned_scale=shape.turned_scale,
        soft_cap=shape.soft_cap,
        drop=shape.drop,
        drop_attention=shape.drop_attention,
        hide=batch.hidden(),
        positions=batch.positions,
    )


def _norm(parameters: gpt.Parameters, x: Tensor, name: str, options: Options) -> Tensor:
    pair: Weights = {"ln": parameters[f"{name}.weight"]}
    if f"{name}.bias" in parameters:
        pair["ln_b"] = parameters[f"{name}.bias"]
    return norm(x, pair, "ln", options)


def embed(parameters: gpt.Parameters, model: Encoder, batch: Batch, options: Options) -> Tensor:
    """The stream that enters the first layer, [batch, tokens, hidden]."""
    x = parameters["embedding.word_embeddings.weight"][batch.tokens]
    if model.stack.position == "learned":
        positions = torch.arange(x.shape[1])[None] if batch.positions is None else batch.positions
        x = x + parameters["embedding.position_embeddings.weight"][positions]
    if model.token_types:
        types = torch.zeros_like(batch.tokens) if batch.types is None else batch.types
        x = x + parameters["embedding.tokentype_embeddings.weight"][types]
    x = model.stack.drop(x)
    return _norm(parameters, x, "embedding.norm", options) if model.embedding_normed else x


def hidden_states(
    parameters: gpt.Parameters, model: Encoder, batch: Batch, trace: list[Tensor] | None = None
) -> Tensor:
    """What the head reads, [batch, tokens, hidden].

    trace: gets the stream entering layer 1 and every layer's output.
    """
    options = _options(model.stack, batch)
    family = gpt.FAMILIES[model.stack.scheme]
    x = embed(parameters, model, batch, options)
    if trace is not None:
        trace.append(x)
    layers = {name.replace("encoder.", "decoder.", 1): value for name, value in parameters.items()}
    x = family.run(layers, model.stack, x, options, trace)
    return _norm(parameters, x, "encoder.final_layernorm", options) if family.final_norm else x


def head(parameters: gpt.Parameters, model: Encoder, hidden: Tensor) -> Tensor:
    """Logits [..., padded vocabulary] of hidden states [..., hidden]."""
    shape = model.stack
    table = parameters.get("output_layer.weight", parameters["embedding.word_embeddings.weight"])
    if model.plain_head:
        return linear(shape.logit_scale * hidden, table, parameters.get("output_layer.bias"))
    x = linear(hidden, parameters["head.dense.weight"], parameters.get("head.dense.bias"))
    x = activate(x, POINTWISE.get(shape.activation, shape.activation))
    x = _norm(parameters, x, "head.norm", Options(shape.heads, norm=shape.normalization, eps=shape.eps))
    return capped(shape.logit_scale * x @ table.T + parameters["head.bias"], shape.logit_soft_cap)


def logits(
    parameters: gpt.Parameters, model: Encoder, batch: Batch, trace: list[Tensor] | None = None
) -> Tensor:
    """Logits of every position, [batch, tokens, padded vocabulary].

    trace: as in `hidden_states`.
    """
    return head(parameters, model, hidden_states(parameters, model, batch, trace))


def losses(
    parameters: gpt.Parameters, model: Encoder, batch: Batch, labels: Tensor, vocab_size: int | None = None
) -> Tensor:
    """Cross-entropy in nats of every position with a target, [targets], row by row.

    labels: [batch, tokens], IGNORED where there is no target.
    vocab_size: real rows; the padding above them takes no part in the softmax.
    """
    scores = logits(parameters, model, batch)[labels != IGNORED][:, :vocab_size]
    return F.cross_entropy(scores, labels[labels != IGNORED], reduction="none")


def loss(
    parameters: gpt.Parameters, model: Encoder, batch: Batch, labels: Tensor, vocab_size: int | None = None
) -> Tensor:
    """Mean over the targets of `losses`."""
    return losses(parameters, model, batch, labels, vocab_size).mean()


def parameter_shapes(
    model: Encoder,
    hidden: int,
    ffn: int,
    vocab: int,
    positions: int,
    head_width: int | None = None,
    bias: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter. vocab: with padding."""
    norms: Mapping[str, tuple[int, ...]] = {"weight": (hidden,)}
    if model.stack.normalization == "layernorm":
        norms = {**norms, "bias": (hidden,)}
    stack = gpt.parameter_shapes(model.stack, hidden, ffn, vocab, positions, head_width, bias)
    out = {
        name.replace("decoder.", "encoder.", 1): size
        for name, size in stack.items()
        if not name.startswith("embedding.norm.")
    }
    if model.token_types:
        out["embedding.tokentype_embeddings.weight"] = (model.token_types, hidden)
    if model.embedding_normed:
        out |= {f"embedding.norm.{leaf}": size for leaf, size in norms.items()}
    out["head.dense.weight"] = (hidden, hidden)
    if bias:
        out["head.dense.bias"] = (hidden,)
    out |= {f"head.norm.{leaf}": size for leaf, size in norms.items()}
    out["head.bias"] = (vocab,)
    return out

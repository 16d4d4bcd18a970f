"""Plain PyTorch pieces of a transformer layer, written without any of the product's code.

The references of the depth schemes share them.
Tensors are [batch, tokens, width], weights are [out, in] as in torch. Everything works in float64.
A layer is a dict of tensors: q, k, v, o, fc1, fc2.
Where there are biases, they are bq, bk, bv, bo, bfc1, bfc2.
A norm called `ln1` has its gain under `ln1` and, for LayerNorm, its bias under `ln1_b`.
An entry `ln1_left_out` says that there is no such norm.
An entry `local` marks a layer that sees a window only.
Norms of every head's queries, keys and values are nq, nk and nv,
those of what enters o and fc2 are no and nfc2.
A gated fc1 is [gate; up].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Drop = Callable[[Tensor], Tensor]


def keep(x: Tensor) -> Tensor:
    """No dropout."""
    return x


@dataclass(frozen=True)
class Options:
    """What a layer needs besides weights."""

    heads: int
    groups: int | None = None
    activation: str = "relu"
    norm: str = "layernorm"
    eps: float = 1e-5
    causal: bool = True
    rotary_base: float | None = None
    """None for no rotation."""
    window: int | None = None
    """How far, on either side, a layer marked `local` sees."""
    local_base: float | None = None
    """`rotary_base` of layers marked `local`, where it is another."""
    frequencies: Tensor | None = None
    """Of the first entries of a head, two for each; the others stay. None: of rotary_base, all.

    Layers with `local_base` have that one's, of as many entries.
    """
    turned_scale: float = 1.0
    """Factor on what `frequencies` turn."""
    soft_cap: float | None = None
    """Of scores."""
    drop: Drop = keep
    """After every branch."""
    drop_attention: Drop = keep
    """On attention probabilities."""
    hide: Tensor | None = None
    """Keys hidden from self-attention besides the future.

    True where hidden, broadcastable to [batch, heads, tokens, keys].
    """
    positions: Tensor | None = None
    """Of tokens for the rotation, [batch, tokens]; None for 0, 1, 2 ..."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b."""
    y = x @ weight.T
    return y if bias is None else y + bias


def norm(x: Tensor, weights: Weights, name: str, options: Options) -> Tensor:
    """LayerNorm (biased variance) or RMSNorm over the last dimension; x where it is left out."""
    if name + "_left_out" in weights:
        return x
    if options.norm == "rmsnorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + options.eps) * weights[name]
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + options.eps)
    return y * weights[name] + weights[name + "_b"]


def plain_frequencies(base: float, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """base^(-2i/width)."""
    half = width // 2
    return base ** (-torch.arange(half, dtype=dtype) / half)


def rotate(x: Tensor, frequency: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotary embedding of [batch, heads, tokens, d], halves paired.

    Entry i turns with entry i + d/2 by position x frequency i.
    positions: broadcastable to [batch, heads, tokens]; None for 0, 1, 2 ...
    """
    half = x.shape[-1] // 2
    frequency = frequency.to(x.dtype)
    if positions is None:
        positions = torch.arange(x.shape[-2])
    angle = positions[..., None].to(x.dtype) * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat(
        (a * torch.cos(angle) - b * torch.sin(angle), b * torch.cos(angle) + a * torch.sin(angle)), dim=-1
    )


def capped(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap), by exponentials; x without a cap."""
    if cap is None:
        return x
    grown = torch.exp(2 * x / cap)
    return cap * (grown - 1) / (grown + 1)


def attention(
    u: Tensor,
    weights: Weights,
    options: Options,
    prefix: str = "",
    memory: Tensor | None = None,
    hide: Tensor | None = None,
) -> Tensor:
    """Multi-head attention with output projection.

    memory: keys' and values' source if not u.
    prefix: of the weight names.
    hide: booleans broadcastable to [batch, heads, tokens, memory tokens].
    True where a key must not be seen, besides the causal mask.
    """
    source = u if memory is None else memory
    b, t, _ = u.shape
    s = source.shape[1]
    groups = options.groups or options.heads

    def project(role: str, x: Tensor, heads: int) -> Tensor:
        y = linear(x, weights[prefix + role], weights.get(prefix + "b" + role))
        y = y.view(b, x.shape[1], heads, -1).transpose(1, 2)
        own = f"{prefix}n{role}"
        return norm(y, weights, own, options) if own in weights else y

    q, k, v = project("q", u, options.heads), project("k", source, groups), project("v", source, groups)
    local = "local" in weights
    base = options.local_base if local and options.local_base else options.rotary_base
    if base is not None:
        positions = None if options.positions is None else options.positions[:, None]
        own, width = options.frequencies, q.shape[-1]
        turned = width if own is None else 2 * len(own)
        scale = options.turned_scale
        if own is None or (local and options.local_base):
            own, scale = plain_frequencies(base, turned, q.dtype), 1.0
        q, k = (
            torch.cat((scale * rotate(x[..., :turned], own, positions), x[..., turned:]), dim=-1)
            for x in (q, k)
        )
    # Query head i reads key group i // (heads / groups).
    k, v = (x.repeat_interleave(options.heads // groups, dim=1) for x in (k, v))
    scores = capped(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), options.soft_cap)
    unmasked = scores
    if options.causal and memory is None:
        scores = scores.masked_fill(torch.ones(t, s, dtype=torch.bool).triu(1), -math.inf)
    if local and options.window is not None and memory is None:
        for query in range(t):
            for key in range(s):
                if abs(query - key) > options.window:
                    scores[..., query, key] = -math.inf
    for hidden in (hide, options.hide if memory is None else None):
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
    if local and memory is None:  # or padding in a window of padding would see nothing
        scores = torch.where(torch.eye(t, dtype=torch.bool), unmasked, scores)
    context = options.drop_attention(torch.softmax(scores, dim=-1)) @ v
    context = context.transpose(1, 2).reshape(b, t, -1)
    if prefix + "no" in weights:
        context = norm(context, weights, prefix + "no", options)
    return linear(context, weights[prefix + "o"], weights.get(prefix + "bo"))


def activate(x: Tensor, name: str) -> Tensor:
    """The feed-forward's non-linearity on fc1's output; gated ones halve the width."""
    if name in ("swiglu", "geglu", "geglu_tanh"):
        gate, up = x.chunk(2, dim=-1)
        return activate(gate, {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}[name]) * up
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        return x * torch.sigmoid(x)
    positive = torch.clamp(x, min=0)
    return {"relu": positive, "relu2": positive * positive}[name]


def feed_forward(u: Tensor, weights: Weights, options: Options) -> Tensor:
    """fc2(activation(fc1 u))."""
    hidden = activate(linear(u, weights["fc1"], weights.get("bfc1")), options.activation)
    if "nfc2" in weights:
        hidden = norm(hidden, weights, "nfc2", options)
    return linear(hidden, weights["fc2"], weights.get("bfc2"))

"""Plain PyTorch evaluation of canonical weights.

It is the independent reference for exports, and generates text on one process.
It reads one tensor at a time from the mapping, so that a mapping backed by a file never has the
whole model in memory.
Shape letters: b batch, s new positions, t positions seen so far, h hidden, n query heads,
g key/value heads, d head width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.depth.sublayer import Sublayer
from model.errors import UserError
from model.families.family import Stack
from model.images import ImageConfig
from model.norms import NORMS
from model.parameters.table import logit_bias_name
from model.rotary import frequencies, magnitude

Weights = Mapping[str, Tensor]

CrossAttention = Callable[..., Tensor]
"""From what a branch reads, [b, s, h], and the number of its layer by name, to its output."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass
class Cache:
    """Keys and values [b, g, t, d] of every layer for the positions seen so far."""

    entries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return self.entries[0][0].shape[2] if self.entries else 0

    def select(self, rows: Tensor) -> None:
        """Goes on with some of the sequences, [b], one of them as often as it is named."""
        self.entries = {layer: (k[rows], v[rows]) for layer, (k, v) in self.entries.items()}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new keys and values along the position axis and returns all of them."""
        if layer in self.entries:
            old_k, old_v = self.entries[layer]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.entries[layer] = (k, v)
        return k, v


class Evaluation:
    """The model function of canonical weights, of a decoder or an encoder.

    weights: canonical name -> whole tensor.
    logit_scale: factor on what the output projection reads.
    dtype: arithmetic; weights are cast as they are read.
    epsilons: canonical name of a norm -> its own epsilon, where it is not the configuration's.
    stack: of several, whose sizes and layers these are; None where there is one.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        *,
        logit_scale: float,
        dtype: torch.dtype = torch.float32,
        epsilons: Mapping[str, float] | None = None,
        stack: Stack | None = None,
    ) -> None:
        self.stack = stack or config.stack
        self.plan = config.stack_plan(self.stack)
        self.weights, self.config, self.logit_scale, self.dtype, self.epsilons = (
            weights,
            config.of(self.stack),
            logit_scale,
            dtype,
            epsilons or {},
        )

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        last_only: bool = False,
        *,
        keep: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Logits [b, s, v] of token ids [b, s], padding rows of the vocabulary left out.

        Of a model of images: [b, v] of `tokens` that are images [b, c, h, w], standardised.

        cache: `tokens` continue the sequence in it.
        last_only: keeps the last position.
        keep: [b, s], 0 for padding, which an encoder does not see.
        types: [b, s], rows of an encoder's table of token types; zeros where None.
        Raises UserError when a learned position table is too short.
        """
        if self.config.image is not None:
            return self._of_images(tokens, self.config.image)
        start = cache.length if cache else 0
        hidden = self._hidden(start, tokens.shape[1], keep)
        x_bsh = self._layers(self._embed(tokens, start, types), hidden, cache)
        return self._read(x_bsh[:, -1:] if last_only else x_bsh)

    def _of_images(self, images_bchw: Tensor, image: ImageConfig) -> Tensor:
        kernel = self._weight("embedding.patches.weight")
        kernel = kernel.view(-1, image.channels, image.patch, image.patch)
        bias = self._weight("embedding.patches.bias") if self.config.bias else None
        x_bsh = F.conv2d(images_bchw.to(self.dtype), kernel, bias, stride=image.patch).flatten(2).mT
        if self.config.position == "sinusoidal":
            raise UserError(
                "images with model.position=sinusoidal have no evaluation outside of training yet"
            )
        if image.class_token:
            token = self._weight("embedding.class_token.weight")
            x_bsh = torch.cat((token.expand(len(x_bsh), 1, -1), x_bsh), dim=1)
        if self.config.position == "learned":
            x_bsh = x_bsh + self._weight("embedding.position_embeddings.weight")
        if self.plan.embedding_norm:
            x_bsh = self._norm(x_bsh, "embedding.norm")
        x_bsh = self._layers(x_bsh, torch.zeros(1, x_bsh.shape[1], dtype=torch.bool), None)
        if self.plan.final_norm:
            x_bsh = self._norm(x_bsh, self.stack.final_norm)
        return self._logits(x_bsh[:, 0] if image.class_token else x_bsh.mean(1))

    def _layers(
        self, x_bsh: Tensor, hidden: Tensor, cache: Cache | None, cross: CrossAttention | None = None
    ) -> Tensor:
        """The stream after the last layer.

        hidden: as `_hidden` gives it. cross: the branch that reads another stack, if there is one.
        """
        start = cache.length if cache else 0
        near = self._near(hidden, start, x_bsh.shape[1]).to(x_bsh.device)
        hidden = hidden.to(x_bsh.device)
        for index, layer in enumerate(self.plan.layers):
            name, given = self.stack.layer(index), x_bsh
            kept = 1 - F.silu(self._weight(f"{name}gpas.gate")) if layer.gate else None
            unseen = near if self.config.is_local(index) else hidden
            branches: list[tuple[Sublayer, Callable[[Tensor], Tensor], str, str]] = [
                (
                    layer.attention,
                    partial(self._attention, layer=index, start=start, cache=cache, hidden=unseen),
                    "input_layernorm",
                    "self_attention",
                ),
                (
                    layer.mlp,
                    partial(self._mlp, name=f"{name}mlp", normed=layer.mlp.norm_last),
                    "pre_mlp_layernorm",
                    "mlp",
                ),
            ]
            if cross is not None:
                crossing = partial(cross, layer=index)
                branches.insert(1, (layer.cross, crossing, "pre_cross_attn_layernorm", "cross_attention"))
            for sublayer, branch, norm_in, module in branches:
                names = f"{name}{norm_in}", f"{name}{module}"
                x_bsh = self._sublayer(x_bsh, given, sublayer, branch, names, kept)
        return x_bsh

    def _read(self, x_bsh: Tensor) -> Tensor:
        """Logits of the stream after the last layer."""
        return self._logits(self._norm(x_bsh, self.stack.final_norm) if self.plan.final_norm else x_bsh)

    def _logits(self, x_bsh: Tensor) -> Tensor:
        if self.config.head_transform:
            x_bsh = ACTIVATIONS[self.config.activation](self._linear(x_bsh, "head.dense"))
            x_bsh = self._norm(x_bsh, "head.norm")
        table = "embedding.word_embeddings.weight" if self.config.tie_embeddings else "output_layer.weight"
        rows = self.config.vocab_size or self.config.padded_vocab
        logits_bsv = (x_bsh * self.logit_scale) @ self._weight(table)[:rows].T
        if self.config.biased_logits:
            logits_bsv = logits_bsv + self._weight(logit_bias_name(self.config))[:rows]
        return capped(logits_bsv, self.config.logit_soft_cap)

    def _hidden(self, start: int, length: int, keep: Tensor | None) -> Tensor:
        """True where a query [s] must not see a key [t], broadcastable to [b, n, s, t]."""
        if self.stack.causal:
            return torch.ones(length, start + length, dtype=torch.bool).triu(start + 1)
        if keep is None:
            return torch.zeros(1, length, dtype=torch.bool)
        return keep[:, None, None, :] == 0

    def _near(self, hidden: Tensor, start: int, length: int) -> Tensor:
        """The same in a layer with a window. A token sees itself, so that padding sees one."""
        if self.config.window is None:
            return hidden
        back = torch.arange(start, start + length)[:, None] - torch.arange(start + length)
        return (hidden | (back.abs() > self.config.window)) & (back != 0)

    def _weight(self, name: str) -> Tensor:
        return self.weights[name].to(self.dtype)

    def _embed(self, tokens: Tensor, start: int, types: Tensor | None) -> Tensor:
        x_bsh = self.weights["embedding.word_embeddings.weight"][tokens].to(self.dtype)
        if self.config.position == "learned":
            table = self._weight("embedding.position_embeddings.weight")
            if start + tokens.shape[1] > len(table):
                raise UserError(
                    f"{start + tokens.shape[1]} positions asked for, but the model has learned only "
                    f"{len(table)}: shorten the prompt or max_new_tokens"
                )
            x_bsh = x_bsh + table[start : start + tokens.shape[1]]
        if self.config.token_types:
            table = self._weight("embedding.tokentype_embeddings.weight")
            x_bsh = x_bsh + (table[0] if types is None else table[types])
        return self._norm(x_bsh, "embedding.norm") if self.plan.embedding_norm else x_bsh

    def _norm(self, x: Tensor, name: str) -> Tensor:
        gain, epsilon = self._weight(f"{name}.weight"), self.epsilons.get(name, self.config.norm_epsilon)
        kind = NORMS[self.config.normalization]
        bias = self._weight(f"{name}.bias") if "bias" in kind.leaves else None
        return kind.of(x, gain, bias, epsilon)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        alone = self.config.attention.qkv_bias and name.endswith("linear_qkv")
        bias = self._weight(f"{name}.bias") if self.config.bias or alone else None
        return F.linear(x, self._weight(f"{name}.weight"), bias)

    def _sublayer(
        self,
        x: Tensor,
        given: Tensor,
        c: Sublayer,
        branch: Callable[[Tensor], Tensor],
        names: tuple[str, str],
        kept: Tensor | None,
    ) -> Tensor:
        """One application of the equation in `model/depth/scheme.py`.

        given: the layer's input. names: of the norm before, and the beginning of all others'.
        kept: factor of a gate on the sum; None without one.
        """
        norm_in, prefix = names
        normed = self._norm(x, norm_in) if c.norm_in else x
        b = branch(c.input_scale * normed)
        if c.norm_branch:
            b = self._norm(b, f"{prefix}_branch_norm")
        stream = normed if c.residual_from_norm else x
        # Not `residual_scale * stream`: fp32 rounds a factor near 1,
        # and a thousand layers raise that to its 2000th power.
        if c.residual_scale != 1:
            stream = stream + (c.residual_scale - 1) * stream
        out = stream + c.branch_scale * b + c.skip_scale * given
        out = out if kept is None else out * kept
        return self._norm(out, f"{prefix}_output_norm") if c.norm_out else out

    def _last(self, x: Tensor, name: str, normed: bool) -> Tensor:
        """The last matrix of a branch, with a norm before it or not."""
        return self._linear(self._norm(x, f"{name}.input_norm") if normed else x, name)

    def _mlp(self, u: Tensor, name: str, normed: bool) -> Tensor:
        activation = ACTIVATIONS[self.config.activation]
        hidden = self._linear(u, f"{name}.linear_fc1")
        if self.config.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self._last(activation(gate) * up, f"{name}.linear_fc2", normed)
        return self._last(activation(hidden), f"{name}.linear_fc2", normed)

    def _attention(self, u: Tensor, layer: int, start: int, cache: Cache | None, hidden: Tensor) -> Tensor:
        config, (b, s, _) = self.config, u.shape
        name = self.stack.layer(layer) + "self_attention"
        groups, d, share = config.groups, config.kv_channels, config.num_attention_heads // config.groups
        qkv = self._linear(u, f"{name}.linear_qkv").view(b, s, groups, share + 2, d)
        q = qkv[:, :, :, :share].reshape(b, s, groups * share, d).transpose(1, 2)
        k, v = (qkv[:, :, :, share + i].transpose(1, 2) for i in range(2))
        inner = {"q": q, "k": k, "v": v}
        for role in self.plan.layers[layer].attention.inner:
            inner[role] = self._norm(inner[role], f"{name}.{role}_layernorm")
        q, k, v = inner["q"], inner["k"], inner["v"]
        if config.position == "rotary":
            q, k = (self._rotated(x, start, local=config.is_local(layer)) for x in (q, k))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        scores = capped(config.score_scale * (q @ k.transpose(2, 3)) / d**0.5, config.attention.soft_cap)
        probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out = (probabilities @ v).transpose(1, 2).reshape(b, s, -1)
        return self._last(out, f"{name}.linear_proj", self.plan.layers[layer].attention.norm_last)

    def _rotated(self, x_bnsd: Tensor, start: int, *, local: bool) -> Tensor:
        """Queries or keys of positions from `start` on. local: of a layer with a window.

        Angles in at least fp32: low precision would round late positions together.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        positions = torch.arange(start, start + x_bnsd.shape[2], dtype=dtype)
        turns = frequencies(self.config, local=local, dtype=dtype)
        angles_sd, factor = torch.outer(positions, turns).repeat(1, 2), magnitude(self.config, local=local)
        angles_sd = angles_sd.to(x_bnsd.device)
        width = self.config.rotary_width
        turned, rest = x_bnsd[..., :width], x_bnsd[..., width:]
        other = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
        turned = factor * (turned * angles_sd.cos() + other * angles_sd.sin())
        return torch.cat((turned, rest), dim=-1)


def capped(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap), any shape; x without a cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def pick(
    logits_v: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id from logits [v].

    The largest at temperature 0, else sampled after the top-k and then the top-p (nucleus) cut.
    """
    if temperature == 0:
        return int(logits_v.argmax())
    # From the largest down, so that no quotient by a small temperature overflows.
    logits_v = (logits_v.double() - logits_v.max()) / temperature
    if top_k is not None and top_k < len(logits_v):
        logits_v = logits_v.masked_fill(logits_v < logits_v.topk(top_k).values[-1], float("-inf"))
    probabilities_v = logits_v.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities_v.sort(descending=True)
        # A token stays while the mass before it is below top_p, so that at least one always stays.
        ordered[ordered.cumsum(0) - ordered >= top_p] = 0
        probabilities_v = torch.zeros_like(probabilities_v).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities_v, 1, generator=generator))


def generate(
    weights: Weights,
    config: ModelConfig,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    *,
    logit_scale: float,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Continues token ids one at a time, each yielded as it is chosen.

    Ends after `stop_id` (which is yielded) or max_new_tokens.
    Every step reads every weight once: pass a dict for speed.
    Raises UserError on an empty prompt, ids outside the vocabulary or sampling settings out of
    range, and while it goes on where logits are not finite.
    """
    checks = (
        (
            not ids,
            "the prompt is empty: give at least one token (the end-of-document token starts a document)",
        ),
        (
            any(not 0 <= i < (config.vocab_size or config.padded_vocab) for i in ids),
            f"the prompt has token ids outside the vocabulary of {config.vocab_size}",
        ),
        # Not `temperature < 0`, which a NaN would pass.
        (not temperature >= 0, f"--temperature {temperature} must be 0 (greedy) or larger"),
        (top_k is not None and top_k < 1, f"--top-k {top_k} must be at least 1"),
        (top_p is not None and not 0 < top_p <= 1, f"--top-p {top_p} must lie in (0, 1]"),
        (not -(1 << 63) <= seed < 1 << 64, f"--seed {seed} has more than 64 bits"),
    )
    for wrong, message in checks:
        if wrong:
            raise UserError(message)
    generator = torch.Generator().manual_seed(seed)
    return _continue(
        Evaluation(weights, config, logit_scale=logit_scale),
        ids,
        max_new_tokens,
        stop_id,
        lambda logits: pick(logits, temperature, top_k, top_p, generator),
    )


def _continue(
    evaluation: Evaluation,
    ids: list[int],
    max_new_tokens: int,
    stop_id: int | None,
    choose: Callable[[Tensor], int],
) -> Iterator[int]:
    cache, tokens = Cache(), torch.tensor([ids])
    for _ in range(max_new_tokens):
        logits_v = evaluation(tokens, cache, last_only=True)[0, -1]
        if not logits_v.isfinite().all():
            raise UserError("the model's logits are not finite: this checkpoint generates nothing")
        token = choose(logits_v)
        yield token
        if token == stop_id:
            return
        tokens = torch.tensor([[token]])

"""A transformer with norms and residual coefficients per layer, and the language model on it.

This file travels with the weights and needs transformers only.
The heads of an encoder are in modeling_fathom_encoder.py.
Shape letters: b batch, s new positions, t positions seen so far, h hidden, n query heads,
g key/value heads, d head width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_fathom import FathomConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
GATED = ("swiglu", "geglu", "geglu_tanh")


class FathomNorm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in at least fp32."""

    def __init__(self, config: FathomConfig, width: int | None = None) -> None:
        super().__init__()
        width = width or config.hidden_size
        self.epsilon = config.norm_epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.normalization == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).to(
            x.dtype
        ) * self.weight


class FathomAttention(nn.Module):
    """Self-attention, causal or not.

    Fewer key/value heads than query heads make it grouped-query attention.
    """

    def __init__(self, config: FathomConfig, layer_idx: int, coefficients: dict[str, Any]) -> None:
        super().__init__()
        self.q_norm, self.k_norm, self.v_norm = (
            FathomNorm(config, config.head_dim) if coefficients[name] else nn.Identity()
            for name in ("norm_q", "norm_k", "norm_v")
        )
        self.layer_idx, self.head_dim, self.dropout = layer_idx, config.head_dim, config.attention_dropout
        self.causal = config.causal
        self.share = config.num_attention_heads // config.num_key_value_heads
        query, key = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        bias, self.soft_cap = config.bias or config.qkv_bias, config.attention_soft_cap
        self.q_proj = nn.Linear(config.hidden_size, query, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=bias)
        self.o_norm = FathomNorm(config, query) if coefficients["norm_last"] else nn.Identity()
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.bias)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None, cache: Cache | None
    ) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        k, v = k.repeat_interleave(self.share, dim=1), v.repeat_interleave(self.share, dim=1)
        causal = self.causal and mask is None and q.shape[2] > 1
        dropout = self.dropout if self.training else 0.0
        if self.soft_cap:
            out_bnsd = capped_attention(q, k, v, mask, dropout, causal, self.soft_cap)
        else:
            out_bnsd = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
            )
        return self.o_proj(self.o_norm(out_bnsd.transpose(1, 2).flatten(2)))


def capped(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap); x without a cap."""
    return torch.tanh(x / cap) * cap if cap else x


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, cap: float
) -> Tensor:
    """Attention over q, k, v [b, n, s, d] with a soft cap on its scores, in at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = capped((q @ k.transpose(2, 3)).to(wide) * q.shape[-1] ** -0.5, cap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v


def visible(attention_mask: Tensor) -> Tensor:
    """True for the tokens of attention_mask [b, t], and for all of a row that is padding only.

    A row with nothing to attend to would be NaN.
    """
    seen = attention_mask.bool()
    return seen | ~seen.any(-1, keepdim=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [b, n, s, d] by cos, sin [b, 1, s, w], on its first w components.

    Component i turns with component i + w/2.
    """
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


class FathomMLP(nn.Module):
    """Feed-forward, gated or not."""

    def __init__(self, config: FathomConfig, coefficients: dict[str, Any]) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.down_norm = (
            FathomNorm(config, config.intermediate_size) if coefficients["norm_last"] else nn.Identity()
        )
        self.gate_proj = (
            nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
            if config.activation in GATED
            else None
        )
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.down_norm(self.activation(self.up_proj(x))))
        return self.down_proj(self.down_norm(self.activation(self.gate_proj(x)) * self.up_proj(x)))


class FathomSublayer(nn.Module):
    """A branch with its norms and coefficients; the equation is in configuration_fathom.py."""

    def __init__(self, config: FathomConfig, branch: nn.Module, coefficients: dict[str, Any]) -> None:
        super().__init__()
        # Python floats, not buffers: a build on the meta device would leave buffers without values.
        self.c, self.dropout, self.branch = coefficients, config.hidden_dropout, branch
        self.norm_in, self.norm_branch, self.norm_out = (
            FathomNorm(config) if coefficients[name] else nn.Identity()
            for name in ("norm_in", "norm_branch", "norm_out")
        )

    def forward(self, x: Tensor, layer_input: Tensor, *args: Any) -> Tensor:
        return self.norm_out(self.sum(x, layer_input, *args))

    def sum(self, x: Tensor, layer_input: Tensor, *args: Any) -> Tensor:
        """What comes out, before a norm on it."""
        c = self.c
        normed = self.norm_in(x)
        b = self.norm_branch(self.branch(c["input_scale"] * normed, *args))
        # The sum is rounded once: sixteen bits hold no factor of the residual near 1, fp32 hardly.
        wide = torch.promote_types(x.dtype, torch.float32)
        kept = (normed if c["residual_from_norm"] else x).to(wide)
        if c["residual_scale"] != 1:
            kept = kept + (c["residual_scale"] - 1) * kept
        out = kept + F.dropout(c["branch_scale"] * b.to(wide), self.dropout, self.training)
        if c["skip_scale"]:
            out = out + c["skip_scale"] * layer_input.to(wide)
        return out.to(x.dtype)


class FathomGate(nn.Module):
    """x - silu(gate) x, of which gradients see the first x only."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x - F.silu(self.gate).to(x.dtype) * x.detach()


class FathomLayer(nn.Module):
    """Attention, then feed-forward, and the stream's gate after each of them where there is one."""

    def __init__(
        self,
        config: FathomConfig,
        layer_idx: int,
        attention: dict[str, Any],
        mlp: dict[str, Any],
        gate: bool,
    ) -> None:
        super().__init__()
        self.gate = FathomGate() if gate else nn.Identity()
        self.attention = FathomSublayer(config, FathomAttention(config, layer_idx, attention), attention)
        self.mlp = FathomSublayer(config, FathomMLP(config, mlp), mlp)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None, cache: Cache | None
    ) -> Tensor:
        return self.gate(self.mlp(self.gate(self.attention(x, x, mask, rotation, cache)), x))


class FathomPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about these models."""

    config_class = FathomConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["FathomLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module: nn.Module) -> None:
        """Plain normal weights, for heads added later; a scheme's own belong to pretraining."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, FathomNorm):
            nn.init.ones_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)


class FathomModel(FathomPreTrainedModel):
    """Embeddings and the stack of layers."""

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.position == "learned"
            else None
        )
        self.embed_types = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        )
        self.embed_norm = FathomNorm(config) if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(self.make_layers(config))
        self.norm = FathomNorm(config) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def make_layers(self, config: FathomConfig) -> list[FathomLayer]:
        """The layers, from the bottom up."""
        return [
            FathomLayer(config, index, *pair, gate)
            for index, (pair, gate) in enumerate(zip(config.sublayers(), config.gates(), strict=True))
        ]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """attention_mask [b, t]: 1 for tokens, 0 for padding.

        token_type_ids [b, s]: rows of the segment table; zeros where None.
        Raises ValueError without exactly one of input_ids and inputs_embeds,
        and for segments in a model that has no table of them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        recompute = self.gradient_checkpointing and self.training
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not recompute
        use_cache = use_cache and self.config.causal
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        start = int(cache.get_seq_length()) if cache is not None else 0
        if position_ids is None:
            position_ids = self._positions(attention_mask, start, x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        x = self._add_types(x, token_type_ids)
        x = self.embed_norm(F.dropout(x, self.config.hidden_dropout, self.training))
        mask = self._mask(attention_mask, start, x)
        seen = [(mask, self._rotation(position_ids, x, None))]
        if self.config.window is not None:
            rotation = self._rotation(position_ids, x, self.config.rotary_base_local)
            seen.append((self._near(mask, start, x), rotation))
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[
            Tensor
        ] = []  # filled only where asked for: a thousand layers' outputs of a batch fill a GPU
        for index, layer in enumerate(self.layers):
            mask, rotation = seen[self.config.is_local(index)]
            if keep:
                states.append(x)
            if recompute:
                x = self._gradient_checkpointing_func(layer.__call__, x, mask, rotation, None)
            else:
                x = layer(x, mask, rotation, cache)
        x = self.norm(x)
        hidden_states = (*states, x) if keep else None
        return BaseModelOutputWithPast(
            last_hidden_state=x, past_key_values=cache, hidden_states=hidden_states
        )

    def _positions(self, attention_mask: Tensor | None, start: int, x: Tensor) -> Tensor:
        """[b or 1, s], of x [b, s, h] from position `start` on. Padding on the left takes none."""
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start : start + x.shape[1]]
        return torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0)

    def _add_types(self, x: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Adds the segments' rows to x [b, s, h]. Raises ValueError where there is no table."""
        if self.embed_types is not None:
            table = self.embed_types.weight
            return x + (table[0] if token_type_ids is None else F.embedding(token_type_ids, table))
        if token_type_ids is not None and bool(token_type_ids.any()):
            raise ValueError(
                "token_type_ids has segments other than 0, but this model has no segment table "
                "(type_vocab_size=0): leave token_type_ids out"
            )
        return x

    def _mask(self, attention_mask: Tensor | None, start: int, x: Tensor) -> Tensor | None:
        """True where query [s] may see key [t], [b or 1, 1, s, t].

        None where causality, or its absence, says it all.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask must be [batch, positions], got shape {tuple(attention_mask.shape)}: "
                "caches of fixed length (cache_implementation='static') and masks between positions "
                "are not supported; use the default cache, and a mask of padding"
            )
        padded = attention_mask is not None and not bool(attention_mask.all())
        if not self.config.causal:
            return visible(attention_mask)[:, None, None] if padded and attention_mask is not None else None
        if not padded and (start == 0 or x.shape[1] == 1):
            return None
        queries = torch.arange(start, start + x.shape[1], device=x.device)[:, None]
        keys = torch.arange(start + x.shape[1], device=x.device)
        allowed = (keys <= queries)[None, None]
        if attention_mask is None or not padded:
            return allowed
        # A padding position still sees itself:
        # a row with nothing to attend to would be NaN and spread.
        return (allowed & attention_mask[:, None, None, : len(keys)].bool()) | (keys == queries)

    def _near(self, mask: Tensor | None, start: int, x: Tensor) -> Tensor:
        """The mask of a layer with a window. A position sees itself, so padding sees one."""
        queries = torch.arange(start, start + x.shape[1], device=x.device)[:, None]
        back = queries - torch.arange(start + x.shape[1], device=x.device)
        near = back.abs() <= self.config.window
        near = near & (back >= 0) if self.config.causal else near
        return near[None, None] if mask is None else (near & mask) | (back == 0)

    def _rotation(
        self, position_ids: Tensor, x: Tensor, own_base: float | None
    ) -> tuple[Tensor, Tensor] | None:
        """cos and sin [b, 1, s, w] of the rotary angles, computed in at least fp32.

        own_base: of layers that have another than the others, plain and with all else alike.
        """
        config = self.config
        if config.position != "rotary":
            return None
        dtype, width = torch.promote_types(x.dtype, torch.float32), int(config.head_dim * config.rotary_share)
        factor = 1.0 if own_base else config.rotary_factor
        if own_base or config.rotary_frequencies is None:
            powers = torch.arange(0, width, 2, dtype=dtype, device=x.device) / width
            frequencies = 1.0 / (own_base or config.rotary_base) ** powers
        else:
            frequencies = torch.tensor(config.rotary_frequencies, dtype=dtype, device=x.device)
        angles = (position_ids[:, None, :, None].to(dtype) * frequencies).repeat(1, 1, 1, 2)
        return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)


class FathomForCausalLM(FathomPreTrainedModel, GenerationMixin):
    """The language model.

    With tied embeddings the logits use the embedding table itself, and there is no lm_head.
    """

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        self.model = FathomModel(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.logit_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.logit_bias else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """labels [b, s]: token ids, shifted inside; -100 is left out of the loss.

        logits_to_keep: last positions to compute logits for, 0 for all.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
        )
        hidden = out.last_hidden_state
        hidden = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        table = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(self.config.logit_scale * hidden, table, self.logit_bias)
        logits = capped(logits, self.config.logit_soft_cap)
        loss = (
            None
            if labels is None
            else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        )
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return result.to_tuple() if return_dict is False else result


# So that saving a loaded model writes this file and the configuration's again,
# with every version of transformers.
FathomConfig.register_for_auto_class()
FathomModel.register_for_auto_class("AutoModel")
FathomForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "ACTIVATIONS",
    "FathomForCausalLM",
    "FathomLayer",
    "FathomModel",
    "FathomNorm",
    "FathomPreTrainedModel",
    "FathomSublayer",
    "capped",
    "visible",
]

"""An encoder and a decoder that reads it: translation, and whatever else one text makes of another.

This file travels with the weights and needs transformers and modeling_fathom.py only.
Shape letters: b batch, s new positions of the decoder, t positions of the encoder, h hidden,
n heads, d head width, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)

from .configuration_fathom import FathomConfig
from .modeling_fathom import (
    FathomLayer,
    FathomModel,
    FathomPreTrainedModel,
    FathomSublayer,
    capped,
    visible,
)


class FathomCrossAttention(nn.Module):
    """Attention of a decoder to what its encoder gives."""

    def __init__(self, config: FathomConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim, self.dropout = layer_idx, config.head_dim, config.attention_dropout
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.bias)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None, cache: EncoderDecoderCache | None
    ) -> Tensor:
        """x [b, s, h]; memory [b, t, h], read once with a cache; mask: True where it is seen."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = self._keys_and_values(memory, cache)
        out_bnsd = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.o_proj(out_bnsd.transpose(1, 2).flatten(2))

    def _keys_and_values(self, memory: Tensor, cache: EncoderDecoderCache | None) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.is_updated.get(self.layer_idx):
            kept = cache.cross_attention_cache
            if hasattr(kept, "layers"):  # since transformers 4.56
                return kept.layers[self.layer_idx].keys, kept.layers[self.layer_idx].values
            return kept.key_cache[self.layer_idx], kept.value_cache[self.layer_idx]
        k, v = (
            linear(memory).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return k, v


class FathomStackLayer(FathomLayer):
    """Attention, cross-attention in a decoder, and feed-forward.

    The stream's gate stands after each sum, before a norm on it.
    """

    def __init__(
        self,
        config: FathomConfig,
        layer_idx: int,
        pair: tuple[dict[str, Any], dict[str, Any]],
        gate: bool,
        cross: dict[str, Any] | None,
    ) -> None:
        super().__init__(config, layer_idx, *pair, gate)
        self.cross = (
            None if cross is None else FathomSublayer(config, FathomCrossAttention(config, layer_idx), cross)
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        cache: EncoderDecoderCache | None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        own, given = None if cache is None else cache.self_attention_cache, x
        x = self._after(self.attention, x, given, mask, rotation, own)
        if self.cross is not None:
            x = self._after(self.cross, x, given, memory, memory_mask, cache)
        return self._after(self.mlp, x, given)

    def _after(self, part: FathomSublayer, x: Tensor, given: Tensor, *args: Any) -> Tensor:
        return part.norm_out(self.gate(part.sum(x, given, *args)))


class FathomStack(FathomModel):
    """An encoder, or a decoder that reads one.

    words: the table of another stack that this one shares; None for its own.
    """

    def __init__(self, config: FathomConfig, words: nn.Module | None = None) -> None:
        super().__init__(config)
        # In a list, so that a shared table is a module of its owner alone.
        self.words: list[nn.Module] = []
        if words is not None:
            self.embed_tokens = None  # type: ignore[assignment]
            self.words = [words]

    def make_layers(self, config: FathomConfig) -> list[FathomLayer]:
        """The layers, from the bottom up."""
        parts = zip(config.sublayers(), config.gates(), config.crosses(), strict=True)
        return [FathomStackLayer(config, index, *part) for index, part in enumerate(parts)]

    def get_input_embeddings(self) -> nn.Module:
        return self.words[0] if self.words else self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        if self.words:
            self.words = [value]
        else:
            self.embed_tokens = value

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """attention_mask [b, s so far], encoder_attention_mask [b, t]: 1 for tokens, 0 for padding.

        encoder_hidden_states: [b, t, h], of a decoder.
        Raises ValueError without exactly one of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        recompute = self.gradient_checkpointing and self.training
        cache = None if recompute else self._cache(past_key_values, use_cache)
        start = int(cache.get_seq_length()) if cache is not None else 0
        if position_ids is None:
            position_ids = self._positions(attention_mask, start, x)
        x = self._with_positions(x, position_ids)
        x = self.embed_norm(F.dropout(x, self.config.hidden_dropout, self.training))
        rotation = self._rotation(position_ids, x, None)
        mask = self._mask(attention_mask, start, x)
        seen = None
        if encoder_attention_mask is not None and not bool(encoder_attention_mask.all()):
            seen = visible(encoder_attention_mask)[:, None, None]
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[Tensor] = []
        for layer in self.layers:
            if keep:
                states.append(x)
            if recompute:
                x = self._gradient_checkpointing_func(
                    layer.__call__, x, mask, rotation, None, encoder_hidden_states, seen
                )
            else:
                x = layer(x, mask, rotation, cache, encoder_hidden_states, seen)
        x = self.norm(x)
        hidden_states = (*states, x) if keep else None
        if not self.config.causal:
            result = BaseModelOutput(last_hidden_state=x, hidden_states=hidden_states)
        else:
            result = BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=x, past_key_values=cache, hidden_states=hidden_states
            )
        return result.to_tuple() if return_dict is False else result

    def _cache(self, given: EncoderDecoderCache | None, use_cache: bool | None) -> EncoderDecoderCache | None:
        if not self.config.causal:
            return None
        if isinstance(given, DynamicCache):
            return EncoderDecoderCache(given, DynamicCache())
        wanted = self.config.use_cache if use_cache is None else use_cache
        if given is None and wanted:
            return EncoderDecoderCache(DynamicCache(), DynamicCache())
        return given

    def _with_positions(self, x: Tensor, position_ids: Tensor) -> Tensor:
        if self.embed_positions is not None:
            return x + self.embed_positions(position_ids)
        if self.config.position != "sinusoidal":
            return x
        half = torch.arange(x.shape[-1] // 2, dtype=torch.float64, device=x.device)
        turns = (self.config.sinusoid["first"] + position_ids[..., None]).double()
        angles = turns * 10000.0 ** (-half / self.config.sinusoid["steps"])
        fixed = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return x + (self.config.sinusoid_scale * fixed).to(x.dtype)


class FathomSeq2SeqModel(FathomPreTrainedModel):
    """Both stacks. Raises ValueError for the configuration of one stack alone."""

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        if config.encoder_depth_plan is None:
            raise ValueError(f"{type(self).__name__} needs an encoder, and encoder_depth_plan has none")
        self.decoder = FathomStack(config)
        self.encoder = self.make_encoder(config)
        self.post_init()

    def make_encoder(self, config: FathomConfig) -> FathomStack:
        """What the decoder reads."""
        words = self.decoder.embed_tokens if config.share_embeddings else None
        return FathomStack(config.of_encoder(), words)

    def memory_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """Which places of what the encoder gives are seen, of the mask of what it reads."""
        return attention_mask

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.encoder

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.decoder.set_input_embeddings(value)
        if self.config.share_embeddings:
            self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Any, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput | tuple[Any, ...]:
        """Masks: 1 for tokens, 0 for padding. encoder_outputs: in place of input_ids."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask,
                inputs_embeds=inputs_embeds,
                output_hidden_states=output_hidden_states,
            )
        out = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=self.memory_mask(attention_mask),
        )
        result = Seq2SeqModelOutput(
            last_hidden_state=out.last_hidden_state,
            past_key_values=out.past_key_values,
            decoder_hidden_states=out.hidden_states,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
        )
        return result.to_tuple() if return_dict is False else result


class FathomForConditionalGeneration(FathomPreTrainedModel, GenerationMixin):
    """The model that makes a text of another one.

    With tied embeddings the logits use the decoder's table itself, and there is no lm_head.
    """

    model_class = FathomSeq2SeqModel

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.logit_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.logit_bias else None
        self.post_init()

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.model.encoder

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.model.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As every model's. New words get no bias."""
        table: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.logit_bias is not None:
            kept = self.logit_bias.data[: table.num_embeddings]
            self.logit_bias = nn.Parameter(F.pad(kept, (0, table.num_embeddings - len(kept))))
        return table

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """What the decoder reads to tell labels [b, s]: the start token, and all but the last."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat((start, labels[:, :-1]), dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Any, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """labels [b, s]: the target and its end mark; -100 is left out of the loss.

        Without decoder_input_ids they are what the labels make of them.
        num_items_in_batch: labels that the loss is divided by; those of this batch where None.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        out = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            output_hidden_states,
        )
        words = self.model.decoder.embed_tokens
        table = words.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(self.config.logit_scale * out.last_hidden_state, table, self.logit_bias)
        logits = capped(logits, self.config.logit_soft_cap)
        loss = None
        if labels is not None:
            count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
            flat = labels.to(logits.device).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), flat, reduction="sum") / count
        result = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            decoder_hidden_states=out.decoder_hidden_states,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            encoder_hidden_states=out.encoder_hidden_states,
        )
        return result.to_tuple() if return_dict is False else result


# As in modeling_fathom.py: saving a loaded model writes these files again.
FathomSeq2SeqModel.register_for_auto_class("AutoModel")
FathomForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")

__all__ = ["FathomForConditionalGeneration", "FathomSeq2SeqModel"]

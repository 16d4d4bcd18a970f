"""What stands on an encoder: masked language modelling, and heads for fine-tuning.

This file travels with the weights and needs transformers and modeling_fathom.py only.
Shape letters: b batch, s positions, h hidden, v vocabulary, l labels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .configuration_fathom import FathomConfig
from .modeling_fathom import ACTIVATIONS, FathomModel, FathomNorm, FathomPreTrainedModel, capped, visible


class FathomHead(nn.Module):
    """Linear layer, activation and norm between an encoder and what reads it."""

    def __init__(self, config: FathomConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = FathomNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


def head_of(config: FathomConfig) -> nn.Module:
    """What stands before an output projection or a classifier: nothing where the head is plain."""
    return nn.Identity() if config.plain_head else FathomHead(config)


class FathomEncoder(FathomPreTrainedModel):
    """An encoder to put a head on. Raises ValueError for the configuration of a decoder."""

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        if config.causal:
            raise ValueError(
                f"{type(self).__name__} is for encoders, and this model is a decoder (causal=true)"
            )
        self.num_labels = config.num_labels
        self.model = FathomModel(config)
        given = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout if given is None else given)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed_tokens = value

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        output_hidden_states: bool | None,
    ) -> BaseModelOutputWithPast:
        """What the encoder makes of a batch, with arguments in the order of the classes below."""
        return self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            token_type_ids=token_type_ids,
        )


class FathomForMaskedLM(FathomEncoder):
    """The masked language model.

    With tied embeddings the logits use the embedding table itself, and there is no lm_head.
    """

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        self.head = head_of(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        biased = config.logit_bias or not config.plain_head
        self.logit_bias = nn.Parameter(torch.zeros(config.vocab_size)) if biased else None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As every model's. New words get no bias."""
        table: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.logit_bias is None:
            return table
        old, rows = self.logit_bias, table.num_embeddings
        kept = min(len(old), rows)
        self.logit_bias = nn.Parameter(F.pad(old.data[:kept], (0, rows - kept)))
        return table

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """labels [b, s]: token ids at masked positions; -100 is left out of the loss."""
        out = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states
        )
        hidden = self.config.logit_scale * self.head(out.last_hidden_state)
        table = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = capped(F.linear(hidden, table, self.logit_bias), self.config.logit_soft_cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return result.to_tuple() if return_dict is False else result


class FathomForSequenceClassification(FathomEncoder):
    """A class, or a number, for a whole sequence.

    The head of the masked language model is kept; its output projection gives way to a classifier.
    """

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        self.head = head_of(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """labels [b]: classes, or numbers where num_labels is 1."""
        out = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states
        )
        pooled = pool(out.last_hidden_state, attention_mask, self.config.classifier_pooling)
        logits = self.classifier(self.dropout(self.head(pooled)))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
        result = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return result.to_tuple() if return_dict is False else result


def pool(hidden_bsh: Tensor, attention_mask: Tensor | None, kind: str) -> Tensor:
    """One vector [b, h] of every sequence: its first token's (cls), or the mean of its tokens'."""
    if attention_mask is None:
        return hidden_bsh[:, 0] if kind == "cls" else hidden_bsh.mean(1)
    seen = visible(attention_mask)
    if kind == "cls":
        first = seen.int().argmax(-1)
        return hidden_bsh[torch.arange(len(first), device=first.device), first]
    weight = seen.to(hidden_bsh.dtype)
    return (hidden_bsh * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)


class FathomForTokenClassification(FathomEncoder):
    """A class for every token."""

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """labels [b, s]: classes; -100 is left out of the loss."""
        out = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states
        )
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        result = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return result.to_tuple() if return_dict is False else result


class FathomForQuestionAnswering(FathomEncoder):
    """Where an answer starts and ends in a text."""

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """start_positions, end_positions [b]; those outside of the sequence are left out."""
        out = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states
        )
        start, end = self.qa_outputs(out.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions, **kwargs)
        result = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, hidden_states=out.hidden_states
        )
        return result.to_tuple() if return_dict is False else result


# As in modeling_fathom.py: saving a loaded model writes these files again.
FathomForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
FathomForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
FathomForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
FathomForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")

__all__ = [
    "FathomForMaskedLM",
    "FathomForQuestionAnswering",
    "FathomForSequenceClassification",
    "FathomForTokenClassification",
]

"""Layers of an encoder and a decoder as one sequence.

Between pipeline stages goes one tensor of one shape, the message: the stream of the encoder on top
of that of the decoder, [s_e + s_d, b, h], or s_e / TP + s_d / TP under sequence parallelism.
The first layer of a model chunk takes it apart and the last one puts it together again; the last
layer of the model gives the decoder's stream alone. In between, the encoder's stream travels as the
`context` of Megatron-core's block, and encoder layers change it instead of the stream.

Masks and angles come for both stacks in one tensor each, encoder first:
attention_mask: [b, 1, s_d, s_d], of the decoder's self-attention;
context_mask: [b, 1, s_e + s_d, s_e], who does not see the encoder's positions;
rotary_pos_emb: [s_e + s_d, 1, 1, 2 d].
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from model.layers.layer import DepthLayer


class SeamLayer(DepthLayer):
    """A layer of either stack.

    own_config: Megatron-core's configuration with the sizes of its stack.
    joins: it is its chunk's last layer, and not the model's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        own_config: TransformerConfig,
        joins: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(own_config, *args, **kwargs)
        self.hands_on = joins
        self.shards = config.tensor_model_parallel_size if config.sequence_parallel else 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass, of which `own_pass` is what may be compiled.

        A function that also took messages apart would be another one in the first and in the last
        layer of every chunk.
        """
        return TransformerLayer.__call__(self, *args, **kwargs)

    def own_pass(self, *args: Any, **kwargs: Any) -> Tensor:
        """The stream that this layer changes, after it. Arguments as `DepthLayer.forward`."""
        if self.runs_compiled:
            assert self.compiled is not None
            return self.compiled(self, *args, **kwargs)[0]
        return DepthLayer.forward(self, *args, **kwargs)[0]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: None = None,
        attention_bias: None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the decoder's stream, or the message, and the encoder's stream.

        hidden_states: the decoder's stream; the message where there is no context.
        Raises ValueError without masks.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("packed_seq_params and attention_bias have no effect in this layer")
        if attention_mask is None or context_mask is None:
            raise ValueError("layers of an encoder and a decoder need their masks")
        stream, source = hidden_states, context_mask.shape[-1]
        if context is None:
            rows = source // self.shards
            context, stream = torch.split(hidden_states, [rows, hidden_states.shape[0] - rows])
        stream, context = self.apply_to(stream, context, attention_mask, context_mask, rotary_pos_emb)
        return (torch.cat((context, stream)) if self.hands_on else stream), context

    def apply_to(
        self,
        stream: Tensor,
        context: Tensor,
        attention_mask: Tensor,
        context_mask: Tensor,
        angles: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Both streams after the layer. Arguments as in `forward`, both streams apart."""
        raise NotImplementedError


class EncoderLayer(SeamLayer):
    """A layer that changes the encoder's stream and hands the decoder's on."""

    def apply_to(
        self,
        stream: Tensor,
        context: Tensor,
        attention_mask: Tensor,
        context_mask: Tensor,
        angles: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As `SeamLayer.apply_to`."""
        source = context_mask.shape[-1]
        own = None if angles is None else angles[:source]
        return stream, self.own_pass(context, context_mask[:, :, :source], rotary_pos_emb=own)


class DecoderLayer(SeamLayer):
    """A layer that changes the decoder's stream by what stands in the encoder's."""

    def apply_to(
        self,
        stream: Tensor,
        context: Tensor,
        attention_mask: Tensor,
        context_mask: Tensor,
        angles: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As `SeamLayer.apply_to`."""
        source = context_mask.shape[-1]
        after = self.own_pass(
            stream,
            attention_mask,
            context,
            context_mask[:, :, source:],
            rotary_pos_emb=None if angles is None else angles[source:],
        )
        return after, context

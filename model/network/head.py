"""Heads that read the positions that have targets: a plain one, and BERT's."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.torch_parts import Norm


class TargetHead(nn.Module):
    """The positions that have targets, for the output projection to read.

    Whole sequences are made of what comes in under sequence parallelism: targets lie on any rank.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.bias: nn.Parameter | None = None
        """On the logits, where the head has one of its own."""

    def forward(self, stream_sbh: Tensor, targets_bt: Tensor | None) -> Tensor:
        """[t, b, h], or [s, b, h] without targets.

        stream_sbh: [s, b, h], or [s / TP, b, h] under sequence parallelism.
        targets_bt: positions.
        """
        if self.sequence_parallel:
            # What follows is the same on all ranks, and so is its gradient.
            stream_sbh = gather_from_sequence_parallel_region(stream_sbh, tensor_parallel_output_grad=False)
        if targets_bt is None:
            return stream_sbh
        index = targets_bt.t()[..., None].expand(-1, -1, stream_sbh.shape[-1])
        return stream_sbh.gather(0, index)


class TransformHead(TargetHead):
    """norm(act(dense(x))) of the positions that have targets, and the bias of the output layer.

    Every tensor-parallel rank computes the same, so that gradients need no sum over ranks.
    The bias is cut as the table of words.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, unit: float) -> None:
        """unit: of the stream that comes in (`model/depth/folded.py`)."""
        super().__init__(config)
        width, dtype = config.hidden_size, config.params_dtype
        self.unit, self.activation = unit, config.activation_func
        self.dense = nn.Linear(width, width, bias=model.bias, dtype=dtype)
        self.norm = Norm(config, width, config.layernorm_epsilon)
        for parameter in self.norm.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
        shards = config.tensor_model_parallel_size
        self.bias = nn.Parameter(torch.zeros(model.padded_vocab // shards, dtype=dtype))
        if shards > 1:
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def forward(self, stream_sbh: Tensor, targets_bt: Tensor | None) -> Tensor:
        """As `TargetHead.forward`."""
        stream_sbh = super().forward(stream_sbh, targets_bt)
        if self.unit != 1.0:
            stream_sbh = stream_sbh * self.unit
        normed: Tensor = self.norm(self.activation(self.dense(stream_sbh.to(self.dense.weight.dtype))))
        return normed

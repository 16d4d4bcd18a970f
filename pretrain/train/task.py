"""What a model is trained for: from tokens to a loss. Next-token prediction so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, arange, nn

Sample = tuple[Tensor, int]
"""Tokens of a micro-batch [b, s + 1], and how many of its rows count; the others fill it up."""


def forward_step(iterator: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Any]:
    """Megatron-core's forward step.

    tokens [b, s + 1] -> output of a chunk, and the function that makes it a loss in nats per token.
    """
    tokens = next(iterator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = arange(inputs.shape[1], device=tokens.device).expand_as(inputs)

    def loss_of(per_token_bs: Tensor) -> tuple[Tensor, Tensor]:
        loss = per_token_bs.float().mean()
        return loss, loss.detach().clone()

    return chunk(inputs, positions, None, labels=labels), loss_of


def evaluation_step(iterator: Iterator[Sample], chunk: nn.Module) -> tuple[Tensor, Any]:
    """As `forward_step`, to the sum over samples of their mean loss.

    In nats per token, in float64.
    """
    tokens, count = next(iterator)
    output, _ = forward_step(iter([tokens]), chunk)

    def loss_of(per_token_bs: Tensor) -> tuple[Tensor, Tensor]:
        loss = per_token_bs[:count].double().mean(1).sum()
        return loss, loss.detach().clone()

    return output, loss_of

"""Measures signal propagation in the plain reference model at given weights.

Variances and late-token gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import gpt


@dataclass(frozen=True)
class Measured:
    """Values by layer, first to last."""

    forward: list[float]
    """torch.var of the stream after the layer."""
    correlation: list[float]
    """Between tokens of a sequence, after the layer."""
    late: list[float]
    """Mean square of the gradient of the stream entering the layer, over the last layer's.

    At positions in the second half of the sequence.
    """


def zipf_tokens(vocab: int, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Independent tokens with p_i ~ 1/i, [batch, length]."""
    weights = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    return torch.multinomial(weights, batch * length, replacement=True, generator=generator).view(
        batch, length
    )


def token_correlation(x: Tensor) -> float:
    """Mean product of different tokens' vectors over the mean square, x: [batch, tokens, width]."""
    gram = torch.einsum("bih,bjh->bij", x, x)
    own = gram.diagonal(dim1=1, dim2=2).sum()
    return float((gram.sum() - own) / (x.shape[1] - 1) / own)


def measure(parameters: Mapping[str, Tensor], shape: gpt.Shape, tokens: Tensor, vocab: int) -> Measured:
    """One forward and backward pass of the next-token loss.

    The last token of each sequence is only a target.
    """
    trainable = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    trace: list[Tensor] = []
    scores = gpt.logits(trainable, shape, tokens[:, :-1], trace)[..., :vocab]
    gradients = torch.autograd.grad(F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()), trace)
    half = trace[0].shape[1] // 2
    late = [float(g[:, half:].square().mean()) for g in gradients]
    streams = [x.detach() for x in trace[1:]]
    return Measured(
        [float(x.var()) for x in streams],
        [token_correlation(x) for x in streams],
        [value / late[-2] for value in late[:-1]],
    )

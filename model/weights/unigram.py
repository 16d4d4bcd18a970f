"""Logits that start at the log frequencies of the tokens.

Token frequencies are what a language model learns first. Where the logits have them from the
start, no layer is bent to supply a constant.

A model with a bias on its logits has them there. Any other with LayerNorm and tied embeddings has
them by initial values alone: coordinate 0 of the last norm's bias is PEAK, and column 0 of the
table of words E holds (log p - sum_v p_v log p_v) / (PEAK s), with s the factor on the hidden state
before the output projection. Then s E (norm + bias) is the centred log p plus what E had before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters.table import WORD_EMBEDDING, logit_bias_name

PEAK = 10.0
"""Bias of the last norm at coordinate 0.

Large beside the norm's own values there, which have variance 1 and multiply the column too.
"""


@dataclass(frozen=True)
class Override:
    """What stands at some places of a parameter instead of what is drawn."""

    index: tuple[slice | int, ...]
    """Of the whole tensor."""
    values: Tensor
    """In float64."""


def centred(log_p_v: Tensor) -> Tensor:
    """log p less its mean over tokens as they occur, [v]: logits of the same frequencies."""
    return log_p_v - (log_p_v.exp() * log_p_v).sum()


def column(config: ModelConfig, logit_scale: float, log_p_v: Tensor) -> Tensor | None:
    """Column 0 of the table of words, [v]; None where a bias on the logits has the frequencies."""
    return None if config.biased_logits else centred(log_p_v) / (PEAK * logit_scale)


def overrides(config: ModelConfig, logit_scale: float, log_p_v: Tensor) -> dict[str, Override]:
    """Canonical name -> what stands there at the start, in a model with `init.unigram`.

    log_p_v: of the vocabulary without padding, float64.
    Raises ValueError for another number of them.
    """
    if log_p_v.shape != (config.vocab_size,):
        raise ValueError(f"log frequencies of shape {tuple(log_p_v.shape)}, vocabulary {config.vocab_size}")
    rows, first = slice(config.vocab_size), column(config, logit_scale, log_p_v)
    if first is None:
        return {logit_bias_name(config): Override((rows,), centred(log_p_v))}
    return {
        WORD_EMBEDDING: Override((rows, 0), first),
        f"{config.depth_plan().last_norm}.bias": Override((0,), torch.tensor(PEAK, dtype=torch.float64)),
    }


def last_bias_moments(config: ModelConfig, log_p_v: Tensor | None) -> tuple[float, float]:
    """Variance and mean square that PEAK adds to the entries of the stream after the last layer.

    0 where the last norm stands behind the layers, or the logits have a bias of their own.
    log_p_v: None without `init.unigram`.
    """
    plan = config.stack_plan(config.blueprint.stacks[-1])
    if log_p_v is None or config.biased_logits or plan.final_norm:
        return 0.0, 0.0
    mean, square = PEAK / config.hidden_size, PEAK**2 / config.hidden_size
    return square - mean**2, square


def word_moments(
    config: ModelConfig, variance: float, logit_scale: float, log_p_v: Tensor | None
) -> tuple[float, float]:
    """Mean square of an entry of a token's vector, and the part of it that equal tokens share.

    Tokens are taken as they occur and independently, so that column 0, whose mean is then 0,
    belongs to the first only. variance: of the drawn entries. log_p_v: None without `init.unigram`.
    """
    first = None if log_p_v is None else column(config, logit_scale, log_p_v)
    if log_p_v is None or first is None:
        return variance, variance
    drawn = variance * (config.hidden_size - 1) / config.hidden_size
    return drawn + float((log_p_v.exp() * first.square()).sum()) / config.hidden_size, drawn

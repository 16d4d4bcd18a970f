"""Frequencies of rotary embeddings: plain, or scaled for texts longer than those learned on.

With base B and d turning entries of a head, entry i and entry i + d/2 turn by
position x B^(-2 i / d) (Su et al. 2021). Scaling changes these d/2 frequencies f once, and they
are the same for every length, so that caches, packing and checkpoints know nothing of it:

* linear (Chen et al. 2023): f / factor.
* llama3 (Llama 3.1, its published code): with n = L f / 2 pi turns over the L original positions,
  f / factor below `low_frequency` turns, f above `high_frequency`, and between them
  (1 - s) f / factor + s f, s = (n - low) / (high - low).
* yarn (Peng et al. 2023, section 3.2 and equation 22): the same with a ramp that is linear in the
  number of the entry, between those that make `beta_fast` and `beta_slow` turns; and turned
  queries and keys are multiplied by a factor each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig
from model.sections import RotaryConfig


def frequencies(config: ModelConfig, *, local: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """[d / 2], radians per position, of d turning entries of a head.

    local: of layers with a window, which scaling leaves alone where they have a base of their own.
    dtype: of the arithmetic.
    """
    rotary, width = config.rotary, config.rotary_width
    base = (local and config.rotary_base_local) or config.rotary_base
    plain = 1.0 / base ** (torch.arange(0, width, 2, dtype=dtype) / width)
    if not scales(config, local=local):
        return plain
    if rotary.scaling == "linear":
        return plain / rotary.factor
    kept = (
        _kept_by_turns(plain, rotary) if rotary.scaling == "llama3" else _kept_by_entry(plain, base, rotary)
    )
    return (1 - kept) * plain / rotary.factor + kept * plain


def scales(config: ModelConfig, *, local: bool = False) -> bool:
    """Whether frequencies are scaled. local: as in `frequencies`."""
    return config.rotary.scaling != "none" and not (local and config.rotary_base_local is not None)


def magnitude(config: ModelConfig, *, local: bool = False) -> float:
    """Factor on cosines and sines. local: as in `frequencies`."""
    rotary = config.rotary
    if rotary.scaling != "yarn" or not scales(config, local=local):
        return 1.0
    return rotary.attention_factor or 0.1 * math.log(rotary.factor) + 1.0


def _kept_by_turns(plain: Tensor, rotary: RotaryConfig) -> Tensor:
    """Share of each frequency [d / 2] that llama3 keeps."""
    assert rotary.original_positions is not None
    turns = rotary.original_positions * plain / (2 * math.pi)
    return ((turns - rotary.low_frequency) / (rotary.high_frequency - rotary.low_frequency)).clamp(0, 1)


def _kept_by_entry(plain: Tensor, base: float, rotary: RotaryConfig) -> Tensor:
    """Share of each frequency [d / 2] that yarn keeps."""
    assert rotary.original_positions is not None
    width = 2 * len(plain)

    def entry(turns: float) -> float:
        """The entry, between two of them too, that makes so many turns over the original length."""
        assert rotary.original_positions is not None
        return width * math.log(rotary.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = entry(rotary.beta_fast), entry(rotary.beta_slow)
    if rotary.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    return 1 - ((torch.arange(len(plain), dtype=plain.dtype) - first) / (last - first)).clamp(0, 1)

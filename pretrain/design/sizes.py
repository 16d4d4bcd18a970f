"""Width, heads and feed-forward width for a number of parameters at a depth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.config import ModelConfig
from model.errors import UserError
from model.parameters.size import parameter_count
from model.words import quantity
from pretrain.config.errors import checked
from pretrain.config.yaml_reader import Plain

HEAD_WIDTHS = (64, 32, 16)
"""Of a head, the widest that leaves a model two heads."""
RATIO, LEAST_RATIO, MOST_RATIO = 4.0, 2.0, 8.0
"""Feed-forward width over width: what is aimed at, and what is taken."""
STEP = 16
"""Feed-forward widths are multiples of this, for the GPU's matrix units."""
TOLERANCE = 0.02
"""Largest distance from the number that was asked for."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a stack."""

    hidden: int
    heads: int
    ffn: int
    parameters: int


def sizes_for(parameters: float, layers: int, base: dict[str, Plain]) -> Sizes:
    """The sizes whose number of parameters fits, with a feed-forward near RATIO times the width.

    base: the other fields of the model section.
    Raises UserError where no width brings the model within TOLERANCE.
    """
    smallest = _count(layers, 2 * HEAD_WIDTHS[-1], 2, STEP, base)
    if parameters < smallest:
        raise UserError(
            f"--params {quantity(parameters)} --layers {layers}: {layers} layers with a vocabulary of "
            f"{base['vocab_size']} have {quantity(smallest)} parameters at the least: ask for more, or for "
            "fewer layers or a smaller --vocab-size"
        )
    for head in HEAD_WIDTHS:
        near = [
            _fitted(parameters, layers, width, head, base)
            for width in _widths(parameters, layers, head, base)
        ]
        fitting = [
            one
            for one in near
            if abs(one.parameters / parameters - 1) <= TOLERANCE
            and LEAST_RATIO <= one.ffn / one.hidden <= MOST_RATIO
        ]
        if fitting:
            return min(fitting, key=lambda one: abs(math.log(one.ffn / one.hidden / RATIO)))
    asked = f"--params {quantity(parameters)} --layers {layers}"
    raise UserError(
        f"{asked}: no width comes within {TOLERANCE:.0%} of it with a feed-forward of {LEAST_RATIO:g} to "
        f"{MOST_RATIO:g} times the width: ask for another number of parameters or of layers"
    )


def _widths(parameters: float, layers: int, head: int, base: dict[str, Plain]) -> range:
    """The widths around that at which the feed-forward is RATIO times as wide."""
    low, high = 2, max(3, math.isqrt(int(parameters / (4 * layers))) // head + 1)
    while high - low > 1:
        middle = (low + high) // 2
        sizes = _fitted(parameters, layers, middle * head, head, base)
        low, high = (middle, high) if sizes.ffn > RATIO * sizes.hidden else (low, middle)
    return range(max(2, low - 1) * head, (high + 2) * head, head)


def _fitted(parameters: float, layers: int, hidden: int, head: int, base: dict[str, Plain]) -> Sizes:
    """The feed-forward width that comes nearest."""
    heads = hidden // head
    one, two = (_count(layers, hidden, heads, width, base) for width in (STEP, 2 * STEP))
    ffn = STEP * max(1, round(1 + (parameters - one) / (two - one)))
    return Sizes(hidden, heads, ffn, one + (ffn // STEP - 1) * (two - one))


def _count(layers: int, hidden: int, heads: int, ffn: int, base: dict[str, Plain]) -> int:
    fields = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    config = checked(ModelConfig, {**base, **fields, "ffn_hidden_size": ffn}, "model.")
    return parameter_count(config)["total"]

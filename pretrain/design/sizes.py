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
    found: list[tuple[float, Sizes]] = []
    for head in HEAD_WIDTHS:
        for hidden in _widths(parameters, layers, head):
            sizes = _fitted(parameters, layers, hidden, hidden // head, base)
            if sizes is not None:
                found.append((abs(math.log(sizes.ffn / hidden / RATIO)), sizes))
        if found:
            return min(found, key=lambda each: each[0])[1]
    smallest = _count(layers, 2 * HEAD_WIDTHS[-1], 2, STEP, base)
    if parameters < smallest:
        raise UserError(
            f"--params {quantity(parameters)} --layers {layers}: {layers} layers with a vocabulary of "
            f"{base['vocab_size']} have {quantity(smallest)} parameters at the least: ask for more, or for "
            "fewer layers or a smaller --vocab-size"
        )
    asked = f"--params {quantity(parameters)} --layers {layers}"
    raise UserError(
        f"{asked}: no width comes within {TOLERANCE:.0%} of it with a feed-forward of {LEAST_RATIO:g} to "
        f"{MOST_RATIO:g} times the width: ask for another number of parameters or of layers"
    )


def _widths(parameters: float, layers: int, head: int) -> range:
    """Widths with two heads or more, up to what the layers would need without a feed-forward."""
    most = math.isqrt(int(parameters / (4 * layers)))
    middle = math.isqrt(int(parameters / ((4 + 2 * RATIO) * layers)))
    least = max(2 * head, middle // 3 // head * head)
    return range(least, most + head, head)


def _fitted(parameters: float, layers: int, hidden: int, heads: int, base: dict[str, Plain]) -> Sizes | None:
    """The feed-forward width that comes nearest, if it is of a usual proportion."""
    one, two = (_count(layers, hidden, heads, width, base) for width in (STEP, 2 * STEP))
    ffn = STEP * max(1, round(1 + (parameters - one) / (two - one)))
    if not LEAST_RATIO <= ffn / hidden <= MOST_RATIO:
        return None
    count = _count(layers, hidden, heads, ffn, base)
    return Sizes(hidden, heads, ffn, count) if abs(count / parameters - 1) <= TOLERANCE else None


def _count(layers: int, hidden: int, heads: int, ffn: int, base: dict[str, Plain]) -> int:
    fields = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    config = checked(ModelConfig, {**base, **fields, "ffn_hidden_size": ffn}, "model.")
    return parameter_count(config)["total"]

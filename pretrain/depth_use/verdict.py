"""What a measurement says, in one line and in a short table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from pretrain.depth_use.measure import Measured, Skip
from pretrain.depth_use.runs import DepthUse

FELT = 1e-3
"""Nats: a smaller change of the loss is none."""
ERRORS = 2.0
"""Standard errors: a smaller change may be chance."""
SHARE = 0.8
"""Of what skipping blocks costs, for the neighbours that carry most of it."""


def effective_depth(measured: Measured) -> int | None:
    """The first layer from which on half of the prediction is made.

    From it on, the divergence from the final prediction is at most half of what it is before the
    first layer.
    None where a divergence is not finite.
    """
    values = [one.divergence for one in measured.predictions]
    if not all(map(math.isfinite, values)):
        return None
    return next(
        (index + 1 for index in reversed(range(len(values))) if values[index] > values[0] / 2),
        0,
    )


def missed(skip: Skip) -> bool:
    """Whether the loss rises without these layers, by more than chance."""
    return not skip.change <= max(FELT, ERRORS * (skip.error or 0.0))


def carriers(blocks: Sequence[Skip]) -> tuple[int, int, float] | None:
    """The fewest neighbouring blocks that carry most of what skipping blocks costs.

    (First layer, last layer, their share); None where no block is missed.
    All changes are finite.
    """
    costs = [block.change if missed(block) else 0.0 for block in blocks]
    total = sum(costs)
    if not total:
        return None
    stretches = (
        (count, -sum(costs[start : start + count]) / total, start)
        for count in range(1, len(blocks) + 1)
        for start in range(len(blocks) - count + 1)
    )
    count, share, start = min(one for one in stretches if one[1] <= -SHARE or one[0] == len(blocks))
    return blocks[start].first, blocks[start + count - 1].last, -share


def verdict(use: DepthUse) -> str:
    """One line in plain words."""
    parts = [_half(use), _blocks(use), _singles(use)]
    return f"{use.run.label}: {'; '.join(parts)}"


def _half(use: DepthUse) -> str:
    depth = effective_depth(use.measured)
    if depth is None:
        return "the prediction on the way is not finite"
    return f"half of the prediction is made by layer {depth} of {use.num_layers}"


def _blocks(use: DepthUse) -> str:
    if not all(math.isfinite(block.change) for block in use.measured.blocks):
        return "the loss without some block of layers is not finite"
    found = carriers(use.measured.blocks)
    if found is None:
        return "no block of layers is missed when it is skipped"
    first, last, share = found
    return f"layers {first} to {last} carry {share:.0%} of what skipping blocks costs"


def _singles(use: DepthUse) -> str:
    singles = use.measured.singles
    wanted = [skip for skip in singles if missed(skip)]
    tried = f"{len(singles)} layers" + " tried" * (len(singles) < use.num_layers)
    if not wanted:
        most = max(abs(skip.change) for skip in singles)
        return f"none of the {tried} is missed alone (changes of the loss below {most:.2g})"
    worst = max(wanted, key=lambda skip: math.inf if math.isnan(skip.change) else skip.change)
    line = f"{len(wanted)} of the {tried} are missed alone (most: layer {worst.first}, {worst.change:+.3f})"
    runs = [list(group) for key, group in groupby(singles, key=missed) if not key]
    longest = max(runs, key=len, default=[])
    if len(longest) > 2:
        line += f", none of layers {longest[0].first} to {longest[-1].first}"
    return line


def table(use: DepthUse) -> str:
    """One row a block: without it, with it, and the prediction after it."""
    head = ["layers", "loss without", "alone", "attention", "FFN", "cosine", "lens loss", "KL", "same top"]
    rows = [head]
    for block in use.measured.blocks:
        layers = use.measured.layers[block.first - 1 : block.last]
        alone = [skip.change for skip in use.measured.singles if block.first <= skip.first <= block.last]
        after = use.measured.predictions[block.last]
        rows.append(
            [
                f"{block.first}-{block.last}" if block.last > block.first else str(block.first),
                f"{block.change:+.4f}",
                f"{sum(alone) / len(alone):+.4f}" if alone else "-",
                *(
                    f"{sum(values) / len(values):.3f}"
                    for values in (
                        [layer.attention_ratio for layer in layers],
                        [layer.mlp_ratio for layer in layers],
                        [layer.cosine for layer in layers],
                    )
                ),
                f"{after.loss:.4f}",
                f"{after.divergence:.4f}",
                f"{after.agreement:.0%}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def facts(use: DepthUse) -> str:
    """What was measured, and on what."""
    return (
        f"{use.run.trained.reader.folder}, {use.precision}\n"
        f"{use.run.data}: {use.measured.tokens:,} tokens, loss {use.measured.loss:.4f}"
    )

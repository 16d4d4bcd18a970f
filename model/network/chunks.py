"""Output projection and loss over some positions at a time, so that few logits exist at once.

The logits are the largest tensor of a model with many tokens in its vocabulary.
Here they live for one chunk of positions.
Its losses are kept, and the backward pass makes its logits again.
That costs the projection's forward product once more, a third of the projection's work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Measure = Callable[[Tensor, Tensor], Tensor]
"""From hidden states [s, b, h] and labels [b, s] to [..., b, s]."""


def in_chunks(measure: Measure, hidden_sbh: Tensor, labels_bs: Tensor, size: int, ranks: int = 1) -> Tensor:
    """What `measure` gives of all positions, [..., b, s], from chunks of at most `size` of them.

    hidden_sbh: [s / ranks, b, h], the part of this rank where sequences are cut over ranks.
    labels_bs: [b, s], of whole sequences.
    size: positions whose logits this rank holds at once, at least one of each of the `ranks`.
    ranks: parts of a sequence, which `measure` gathers: the rows of all ranks, one after the other.
    Equal to `measure(hidden_sbh, labels_bs)`, gradients included, up to the order of sums.
    """
    batch, length = labels_bs.shape
    labels_brs = labels_bs.view(batch, ranks, length // ranks)
    own = max(1, size // ranks)
    parts = []
    for start in range(0, length // ranks, own):
        labels = labels_brs[:, :, start : start + own]
        told = checkpoint(
            measure,
            hidden_sbh[start : start + own],
            labels.reshape(batch, -1),
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here draws
        )
        parts.append(told.view(*told.shape[:-1], ranks, labels.shape[-1]))
    return torch.cat(parts, dim=-1).flatten(-2)

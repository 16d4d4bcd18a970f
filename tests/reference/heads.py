"""Queries, keys and values of a product by loops over its heads."""

from __future__ import annotations

import torch
from torch import Tensor


def heads_of(
    product: Tensor, table: Tensor | None, groups: int, share: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [s, b, groups share, width], keys and values [s, b, groups, width].

    product: [s, b, columns]: of each group `share` query heads, a key, a value.
    table: [s, 1 or b, 1, 2 n], the cosines and sines by which the first n entries of queries and
    keys turn: entry i with entry i + n / 2, each by its own number.
    """
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for group in range(groups):
        for place in range(share + 2):
            start = (group * (share + 2) + place) * width
            head = product[..., start : start + width]
            if place == share + 1:
                values.append(head)
                continue
            (queries if place < share else keys).append(_turned(head, table))
    return torch.stack(queries, 2), torch.stack(keys, 2), torch.stack(values, 2)


def _turned(head: Tensor, table: Tensor | None) -> Tensor:
    if table is None:
        return head
    turning = table.shape[-1] // 2
    cos, sin = table[:, :, 0, :turning], table[:, :, 0, turning:]
    entries = []
    for entry in range(head.shape[-1]):
        if entry >= turning:
            entries.append(head[..., entry])
            continue
        other = (entry + turning // 2) % turning
        entries.append(head[..., entry] * cos[..., entry] + head[..., other] * sin[..., entry])
    return torch.stack(entries, -1)

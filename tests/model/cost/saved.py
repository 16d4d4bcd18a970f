"""Bytes that autograd keeps of a real model's forward pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from model.cost.operators import Kept


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of all storages that autograd keeps of `forward`, the model's parameters left out."""
    kept = Kept(list(model.parameters()))
    with kept:
        forward()
    return kept.bytes

"""Shares of branches on the device: what the residual joins of some layers read in a warm-up.

One tensor holds the numbers of all layers and is filled between steps. Nothing else changes from
step to step, neither code nor addresses, so that compiled layers and captured graphs go on.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from model.depth.ramp import end, share
from model.layers.layer import DepthLayer

STRIDE = 16
"""Elements from one layer's number to the next.

Compiled kernels want the addresses of their inputs at multiples of 16 bytes and copy others.
"""


class BranchShares:
    """Shares of the branches of these layers, by their global numbers.

    kind: one of `model.depth.ramp.RAMPS`.
    span: its T, in steps.
    total: layers of the whole model.
    They are in the format of the branches: in bf16 rounded by at most 0.4 %, and 1 is exact.
    """

    def __init__(self, layers: Iterable[DepthLayer], kind: str, span: int, total: int) -> None:
        self.layers = list(layers)
        self.kind, self.span, self.total = kind, span, total
        self.done: int | None = None
        """Steps that the present numbers are for."""
        self.values = torch.ones(0, STRIDE)
        if self.layers:
            first = self.layers[0]
            device = first.mlp.linear_fc2.weight.device
            self.values = torch.ones(len(self.layers), STRIDE, dtype=first.branch_dtype, device=device)
        self._attach(True)

    def fill(self, done: int) -> None:
        """The numbers after `done` steps, for the next step and for evaluation before it.

        At the end of the warm-up joins stop reading them, but those of compiled layers, which may
        not change between two steps: a share of 1 changes no bit.
        """
        if done == self.done:
            return
        last = end(self.total, self.span)
        was_over, over = self.done is not None and self.done >= last, done >= last
        self.done = done
        if over and was_over:
            return
        if over or was_over:
            self._attach(not over)
        shares = [share(self.kind, layer.layer_number, self.total, self.span, done) for layer in self.layers]
        self.values[:, 0].copy_(torch.tensor(shares, dtype=torch.float64))

    def _attach(self, read: bool) -> None:
        for layer, row in zip(self.layers, self.values, strict=True):
            for join in layer.joins():
                join.share = row[0] if read or layer.compiled is not None else None

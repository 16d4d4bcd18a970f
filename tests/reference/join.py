"""A residual join and the norm after it, written without any of the product's code, in float64.

x' = r R + b (F + bias) + k x_layer, less silu(a) x' where there is a gate a, through which the
gradient of x' goes as if it were not there; and n = s (x' - mean) / sqrt(var + eps) g + c, without
mean and c for RMSNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Join:
    """Tensors of one join: rows [..., h], vectors [h]; None where there is no such term."""

    residual: Tensor | None
    branch: Tensor
    bias: Tensor | None
    layer_input: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    gate: Tensor | None = None
    residual_scale: float = 1.0
    branch_scale: float = 1.0
    skip_scale: float = 1.0
    factor: float = 1.0
    """On what the norm gives."""
    eps: float = 1e-5
    centred: bool = True

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        """(x', n)"""
        added = self.branch if self.bias is None else self.branch + self.bias
        x = self.branch_scale * added
        if self.residual is not None:
            x = x + self.residual_scale * self.residual
        if self.layer_input is not None:
            x = x + self.skip_scale * self.layer_input
        if self.gate is not None:
            x = x - x.detach() * self.gate / (1 + torch.exp(-self.gate))
        if self.gain is None:
            return x, None
        centre = x - x.mean(-1, keepdim=True) if self.centred else x
        size = torch.sqrt(centre.pow(2).mean(-1, keepdim=True) + self.eps)
        n = centre / size * self.gain
        if self.offset is not None:
            n = n + self.offset
        return x, self.factor * n

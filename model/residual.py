"""The residual join: the one place where a branch meets the stream, as a parameter-free module that monitors can hook and a fused kernel can replace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.scheme import Sublayer


class ResidualJoin(nn.Module):
    """x' = residual_scale R + Dropout(branch_scale (b + bias)) + skip_scale x_layer; the middle of the equation in `model/scheme.py`.

    Coefficients are Python floats. A join whose residual_scale is 0 does not read the residual.
    """

    def __init__(self, plan: Sublayer, dropout: float) -> None:
        super().__init__()
        self.branch_scale = plan.branch_scale
        self.residual_scale = plan.residual_scale
        self.skip_scale = plan.skip_scale
        self.dropout = dropout

    def forward(self, residual: Tensor, branch: Tensor, bias: Tensor | None, layer_input: Tensor) -> Tensor:
        """residual, branch, layer_input: [s, b, h]; bias: [h] or None, scaled and dropped out with the branch. Returns the new stream [s, b, h]."""
        if bias is not None:
            branch = branch + bias
        # Dropout only zeroes and rescales, so the factor may follow it, where the add carries it for free.
        if self.dropout and self.training:
            branch = F.dropout(branch, self.dropout)
        if self.residual_scale == 0.0:
            stream = branch * self.branch_scale if self.branch_scale != 1.0 else branch
        else:
            scaled = residual if self.residual_scale == 1.0 else residual * self.residual_scale
            stream = torch.add(scaled, branch, alpha=self.branch_scale)
        if self.skip_scale != 0.0:
            stream = torch.add(stream, layer_input, alpha=self.skip_scale)
        return stream

    def extra_repr(self) -> str:
        """Coefficients, for printing a model."""
        return f"residual={self.residual_scale:.6g}, branch={self.branch_scale:.6g}, skip={self.skip_scale:.6g}, dropout={self.dropout}"

"""The residual join: the one place where a branch meets the stream, as a parameter-free module that monitors can hook and a fused kernel can replace."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.depth.scheme import Sublayer


def join(
    residual: Tensor | None,
    branch: Tensor,
    bias: Tensor | None,
    layer_input: Tensor | None,
    residual_scale: float,
    branch_scale: float,
    skip_scale: float,
) -> Tensor:
    """residual_scale R + branch_scale (b + bias) + skip_scale x_layer, [s, b, h]. residual and layer_input are None where their factor is 0."""
    if bias is not None:
        branch = branch + bias
    if residual is None:
        stream = branch * branch_scale if branch_scale != 1.0 else branch
    else:
        scaled = residual if residual_scale == 1.0 else residual * residual_scale
        stream = torch.add(scaled, branch, alpha=branch_scale)
    if layer_input is not None:
        stream = torch.add(stream, layer_input, alpha=skip_scale)
    return stream


class ResidualJoin(nn.Module):
    """x' = residual_scale R + Dropout(branch_scale (b + bias)) + skip_scale x_layer; the middle of the equation in `model/depth/scheme.py`.

    Coefficients are Python floats. A join whose residual_scale is 0 does not read the residual. function: `join`, or
    `join` compiled, in training; evaluation has `join`.
    """

    def __init__(self, plan: Sublayer, dropout: float) -> None:
        super().__init__()
        self.branch_scale = plan.branch_scale
        self.residual_scale = plan.residual_scale
        self.skip_scale = plan.skip_scale
        self.dropout = dropout
        self.function: Callable[..., Tensor] = join

    def forward(self, residual: Tensor, branch: Tensor, bias: Tensor | None, layer_input: Tensor) -> Tensor:
        """residual, branch, layer_input: [s, b, h]; bias: [h] or None, scaled and dropped out with the branch. Returns the new stream [s, b, h]."""
        if self.dropout and self.training:
            # Dropout only zeroes and rescales, so the factor may follow it, where the add carries it for free.
            branch, bias = F.dropout(branch if bias is None else branch + bias, self.dropout), None
        function = self.function if self.training else join
        return function(
            residual if self.residual_scale != 0.0 else None,
            branch,
            bias,
            layer_input if self.skip_scale != 0.0 else None,
            self.residual_scale,
            self.branch_scale,
            self.skip_scale,
        )

    @property
    def kernels(self) -> int:
        """Operations on whole activations that an uncompiled join without bias takes; each reads and writes memory that one kernel would touch once."""
        reads = (self.residual_scale != 0.0) + (self.skip_scale != 0.0)
        return (
            reads
            + (self.residual_scale not in (0.0, 1.0))
            + (self.residual_scale == 0.0 and self.branch_scale != 1.0)
        )

    def extra_repr(self) -> str:
        """Coefficients, for printing a model."""
        return f"residual={self.residual_scale:.6g}, branch={self.branch_scale:.6g}, skip={self.skip_scale:.6g}, dropout={self.dropout}"

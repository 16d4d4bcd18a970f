"""A norm over a width that tensor-parallel ranks share, each with its own piece."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from model.layers.regions import total
from model.layers.residual import meta_device
from model.layers.torch_parts import Norm


class _Sum(torch.autograd.Function):
    """The sum over ranks, forward and backward.

    Every rank goes on with the sum and has its own share of the loss's gradient to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        summed = x.contiguous().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class CutNorm(Norm):
    """A norm over `width` entries of which this rank has an equal part, with its part of the gain.

    group: the ranks. Its statistics are sums over them, in at least fp32, exact as with one rank.
    """

    def __init__(self, config: TransformerConfig, width: int, group: Any) -> None:
        with meta_device(config):
            super().__init__(config, width // group.size(), config.layernorm_epsilon)
        self.width, self.group = width, group
        for parameter in self.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, width / ranks] -> the same shape and format."""
        if self.group.size() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.bias is not None:
            wide = wide - self._sum(wide) / self.width
        normed = wide * torch.rsqrt(self._sum(wide.square()) / self.width + self.eps) * self.weight
        return (normed if self.bias is None else normed + self.bias).to(x.dtype)

    def _sum(self, x: Tensor) -> Tensor:
        """[s, b, width / ranks] -> sums over the whole width, [s, b, 1]."""
        own = x.sum(-1, keepdim=True)
        if torch.compiler.is_compiling():
            return total(own, self.group)
        summed: Tensor = _Sum.apply(own, self.group)  # type: ignore[no-untyped-call]
        return summed

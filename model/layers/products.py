"""Matrix products of linear layers that add onto what is there already.

Forward, a branch's last product adds onto the residual. Backward, the product that is a weight's
gradient adds onto the sum over micro-batches, instead of making a tensor that is added to it. So do
passes of ours that sum the gradients of biases, gains and offsets (`model/layers/launching.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel import layers as core_layers
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import nn


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total += factor a b, of matrices; total [n, m] is in the format of a [n, k] and b [k, m].

    Or in fp32, where they are in bf16 and on a GPU: PyTorch has no such product for CPUs.
    """
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, alpha=factor, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=factor, out=total)


def _times(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor a b, of matrices, without a pass of its own for the factor."""
    if factor == 1.0:
        return a @ b
    # What a product with beta=0 is added to is not read.
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)


def gradient_of_weight(rows: Tensor, x: Tensor, total: Tensor | None, factor: float = 1.0) -> Tensor | None:
    """That of W in factor x W^T; None where it was added to a total.

    rows: [n, out], the gradient of the product; x: [n, in]; total: [out, in], as `product`.
    """
    if total is None:
        return _times(rows.t(), x, factor)
    add_product(total, rows.t(), x, factor)
    return None


class _Product(torch.autograd.Function):
    """residual + factor x W^T, or x W^T + bias. `product` says of what."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        factor: float,
        total: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor, ctx.total = factor, total
        if residual is None:
            return F.linear(x, weight, bias)
        rows = torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), weight.t(), alpha=factor)
        return rows.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _times(rows, weight, ctx.factor).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = gradient_of_weight(rows, x.flatten(0, -2), ctx.total, ctx.factor)
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, gradient if ctx.needs_input_grad[3] else None, None, None


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    factor: float = 1.0,
    total: Tensor | None = None,
) -> Tensor:
    """x W^T + bias; with a residual, residual + factor x W^T, in one product each way.

    x: [..., in]; weight: [out, in]; bias: [out]; residual: [..., out], which has no bias beside it.
    total: [out, in] in fp32, what the backward pass adds the weight's gradient to. Autograd then
    has none of it, but calls the hooks that a weight has for after its gradient.
    """
    result: Tensor = _Product.apply(x, weight, bias, residual, factor, total)  # type: ignore[no-untyped-call]
    return result


def sum_in_products(parts: Iterable[nn.Module]) -> int:
    """Has linear layers in these parts of a model add gradients to `weight.main_grad` in products.

    Those of layers and of the output; every weight has that sum, in fp32, by now.
    Passes of ours do the same for vectors that they sum.
    Returns the number of linear layers.
    Ours and Transformer Engine's read a switch of one name at every pass.
    Megatron-core's have another, and call an extension of APEX, whose place PyTorch's product takes
    where it is not installed: their own collectives stay beside the products.
    Transformer Engine writes over the sum in a step's first micro-batch, where it is zero.
    """
    found = 0
    modules: list[Any] = [module for part in parts for module in part.modules()]
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.added_in_pass = parameter.dim() == 1
        ours_or_te = hasattr(module, "fuse_wgrad_accumulation")
        core = isinstance(module, (ColumnParallelLinear, RowParallelLinear))
        if ours_or_te:
            module.fuse_wgrad_accumulation = True
        if core:
            module.gradient_accumulation_fusion = True
        found += ours_or_te or core
    if not hasattr(core_layers, "fused_weight_gradient_mlp_cuda"):
        core_layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_of_weight)
    return found


def _of_weight(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    """Adds the gradient of a weight [out, in] to `total`; x: [n, in], gradient: [n, out]."""
    add_product(total, gradient.t(), x)


def add_in_products(layers: Iterable[Any]) -> int:
    """Has the last products of branches in these layers add onto the residuals, in training.

    Returns their number. The layers are of PyTorch's kernels, without tensor parallelism, biases
    and dropout on branches; which joins have a form for it, their plans say. Hooks on a join, and a
    share of its branch, have it apart in that pass.
    """
    found = 0
    for layer in layers:
        for name, plan, part, _, _ in layer.parts():
            if plan.adds_product:
                part.product = [layer.last_linear(name)]
                found += 1
    return found

"""What launches the kernels of `model/layers/heads_kernel.py`, as functions that autograd knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.layers.launching import TILE, Parts, column_grid, column_shape, starts, summing_grid, vector
from model.layers.torch_parts import Heads, separated, views_of

SIZE = TILE // 2
"""Elements of a tile: what is turned backward holds six numbers for each."""


def _angles(table: Tensor | None) -> tuple[int, int, int]:
    """Entries of a head that turn, and strides of the table by position and sample."""
    if table is None:
        return 0, 0, 0
    by_sample = table.stride(1) if table.shape[1] > 1 else 0
    return table.shape[-1] // 2, table.stride(0), by_sample


class _Separated(torch.autograd.Function):
    """Both passes. Without a table the forward one gives views, and is none."""

    @staticmethod
    def forward(
        ctx: Any, product: Tensor, bias: Tensor | None, table: Tensor | None, heads: Heads
    ) -> tuple[Tensor, Tensor, Tensor]:
        product = product.contiguous()
        query, key, value = views_of(product, heads)
        if table is not None:
            turned = torch.empty_like(query, memory_format=torch.contiguous_format)
            turned_key = torch.empty_like(key, memory_format=torch.contiguous_format)
            if starts("heads_forward", (query, key, table), (turned, turned_key)):
                from model.layers.heads_kernel import forward

                s, batch, columns = product.shape
                sizes = s * batch, batch, *heads, *_angles(table)
                shape = column_shape(columns, product.dtype, SIZE)
                grid = column_grid(s * batch, columns, SIZE)
                forward[grid](product, table, turned, turned_key, *sizes, **shape)
            query, key = turned, turned_key
        ctx.save_for_backward(table)
        ctx.heads, ctx.shape = heads, product.shape
        ctx.vector = vector(bias)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (table,) = ctx.saved_tensors
        given = [one if one.stride(-1) == 1 else one.contiguous() for one in gradients]
        s, batch, columns = ctx.shape
        product = given[0].new_empty(ctx.shape)
        grid = summing_grid(s * batch, columns, product.device, SIZE)
        parts = Parts(product, grid[0], columns, [ctx.vector if ctx.needs_input_grad[1] else None])
        if starts("heads_backward", (*given, table), (product,)):
            from model.layers.heads_kernel import backward

            sizes = s * batch, batch, *ctx.heads, *_angles(table)
            strides = [stride for one in given for stride in one.stride()[:3]]
            backward[grid](
                *(*given, table, product, *parts.pointers),
                *sizes,
                *strides,
                **column_shape(columns, product.dtype, SIZE),
            )
        (d_bias,) = parts.totals()
        return product, d_bias, None, None


def separate_pass(
    product: Tensor, bias: Tensor | None, table: Tensor | None, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """As `model.layers.torch_parts.separated`, but of a product that has its bias already.

    bias: detached in the product, its gradient comes from here.
    """
    if bias is None and table is None:
        return separated(product, None, None, heads)
    parts: tuple[Tensor, Tensor, Tensor] = _Separated.apply(product, bias, table, heads)  # type: ignore[no-untyped-call]
    return parts

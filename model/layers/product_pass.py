"""What launches the kernels of `model/layers/product_kernel.py`, as autograd knows it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.layers.activation_pass import KERNELS
from model.layers.launching import (
    Parts,
    ceil_div,
    product_shape,
    programs,
    starts,
    triton_format,
    vector,
    wide_format,
)
from model.layers.products import gradient_of_weight
from model.layers.torch_parts import ColumnLinear, RowLinear
from model.layers.transformer_config import Activation


class _Way(NamedTuple):
    """How a feed-forward is computed."""

    kind: str
    """One of `KERNELS`."""
    gated: bool
    totals: tuple[Tensor | None, Tensor | None]
    """What the gradients of both weights are added to, as `model.layers.products.product`."""

    @property
    def plain(self) -> bool:
        """A ReLU's gradient needs its result only, which the second product keeps anyway."""
        return self.kind == "relu" and not self.gated


class _FeedForward(torch.autograd.Function):
    """Both passes. x: [.., h]; first: [f, h], or [2 f, h] with a gate; second: [out, f]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        bias: Tensor | None,
        second: Tensor,
        last_bias: Tensor | None,
        way: _Way,
    ) -> Tensor:
        x = x.contiguous()
        f, k = second.shape[1], x.shape[-1]
        n = x.numel() // k
        out = x.new_empty((*x.shape[:-1], f))
        inner = None if way.plain else x.new_empty((*x.shape[:-1], first.shape[0]))
        own, beside = (out, []) if inner is None else (inner, [out])
        if starts("product_forward", [bias], [own, *beside], (x, first)):
            from model.layers.product_kernel import forward

            shape = product_shape(x, gated=way.gated)
            grid = ceil_div(f, shape["BLOCK"]), ceil_div(n, shape["ROWS"])
            flags = {"KIND": way.kind, "GATED": way.gated, "WIDE": triton_format(wide_format(x.dtype))}
            forward[grid](x, first, bias, inner, out, n, k, f, **flags, **shape)
        ctx.save_for_backward(x, first, second, out, inner)
        ctx.way, ctx.vector = way, vector(bias)
        return F.linear(out, second, last_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, out, inner = ctx.saved_tensors
        needs, way = ctx.needs_input_grad, ctx.way
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        d_inner, d_bias = _of_inner(rows, second, out if inner is None else inner, ctx)
        inside, before = d_inner.flatten(0, -2), x.flatten(0, -2)
        of_second = gradient_of_weight(rows, out.flatten(0, -2), way.totals[1]) if needs[3] else None
        of_first = gradient_of_weight(inside, before, way.totals[0]) if needs[1] else None
        of_x = (inside @ first).view(x.shape) if needs[0] else None
        return of_x, of_first, d_bias, of_second, rows.sum(0) if needs[4] else None, None


def _of_inner(rows: Tensor, second: Tensor, inner: Tensor, ctx: Any) -> tuple[Tensor, Tensor | None]:
    """The gradients of the first product, shaped as it, and of its bias.

    rows: [n, out], that of what the second product gave.
    """
    (n, k), f, way = rows.shape, second.shape[1], ctx.way
    shape = product_shape(rows, gated=way.gated)
    blocks = ceil_div(f, shape["BLOCK"])
    grid = blocks, min(ceil_div(n, shape["ROWS"]), ceil_div(programs(rows.device), blocks))
    d_inner = torch.empty_like(inner)
    parts = Parts(rows, grid[1], inner.shape[-1], [ctx.vector if ctx.needs_input_grad[2] else None])
    written = [d_inner[..., :f], d_inner[..., f:]] if way.gated else [d_inner]
    if starts("product_backward", [inner], written, (rows, second)):
        from model.layers.product_kernel import backward

        flags = {"KIND": way.kind, "GATED": way.gated, "WIDE": triton_format(wide_format(rows.dtype))}
        backward[grid](rows, second, inner, d_inner, *parts.pointers, n, k, f, **flags, **shape)
    (d_bias,) = parts.totals()
    return d_inner, d_bias


def feed_pass(x: Tensor, first: ColumnLinear, second: RowLinear, function: Activation, gated: bool) -> Tensor:
    """What the second layer gives of the activation of what the first one gives of x [s, b, h].

    Its bias is left to the caller where the layer leaves it. A gate is as that of
    `model.layers.torch_parts.activated`.
    """
    of_first, of_second = (
        one.weight.main_grad if one.fuse_wgrad_accumulation else None for one in (first, second)
    )
    way = _Way(KERNELS[function], gated, (of_first, of_second))
    last_bias = None if second.leaves_bias else second.bias
    out: Tensor = _FeedForward.apply(x, first.weight, first.bias, second.weight, last_bias, way)  # type: ignore[no-untyped-call]
    return out

"""What launches the kernels of `model/layers/normed_kernel.py`, as autograd knows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.layers.activation_pass import KERNELS
from model.layers.launching import (
    TILE,
    Parts,
    ceil_div,
    programs,
    row_shape,
    row_tile,
    starts,
    vector,
    wide_format,
)
from model.layers.transformer_config import Activation


class _Normed(torch.autograd.Function):
    """Both passes. x: [.., f], or [.., 2 f] with a gate; weight, shift: [f]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        shift: Tensor | None,
        kind: str,
        gated: bool,
        eps: float,
    ) -> Tensor:
        x = x.contiguous()
        f, n = weight.numel(), x.numel() // x.shape[-1]
        out = x.new_empty((*x.shape[:-1], f))
        inverses = x.new_empty(n, dtype=wide_format(x.dtype))
        means = None if shift is None else torch.empty_like(inverses)
        read, made = (x, bias, weight, shift), (out, means, inverses)
        ctx.shape = {"KIND": kind, "GATED": gated, "CENTRED": shift is not None}
        if starts("normed_forward", read, made):
            from model.layers.normed_kernel import forward

            shape = ctx.shape | row_shape(f, x.dtype)
            forward[(ceil_div(n, shape["ROWS"]),)](*read, *made, n, f, eps, **shape)
        # Not what the activation gives: the backward pass computes it again.
        ctx.save_for_backward(x, bias, weight, means, inverses)
        ctx.vectors = [vector(one) for one in (weight, shift, bias)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, weight, means, inverses = ctx.saved_tensors
        gradient, f = gradient.contiguous(), weight.numel()
        n = gradient.numel() // f
        dx, count = torch.empty_like(x), _programs(n, f, x.device)
        _, of_bias, *of_norm = ctx.needs_input_grad[:4]
        asked = [
            one if called else None for one, called in zip(ctx.vectors, (*of_norm, of_bias), strict=True)
        ]
        # With a gate the bias is longer than gain and offset: its sums are others.
        parts = [Parts(x, count, f, asked[:2] if ctx.shape["GATED"] else asked)]
        if ctx.shape["GATED"]:
            parts.append(Parts(x, count, 2 * f, asked[2:]))
        read = gradient, x, bias, weight, means, inverses
        if starts("normed_backward", read, (dx,)):
            from model.layers.normed_kernel import backward

            summed = [pointer for one in parts for pointer in one.pointers]
            backward[(count,)](*read, dx, *summed, n, f, **ctx.shape, **row_shape(f, x.dtype))
        d_weight, d_shift, d_bias = (total for one in parts for total in one.totals())
        return dx, d_bias, d_weight, d_shift, None, None, None


def _programs(n: int, f: int, device: torch.device) -> int:
    """Of a backward pass over n rows: fewer where longer rows take more of a multiprocessor."""
    rows, block = row_tile(f)
    return min(ceil_div(n, rows), max(1, programs(device) * TILE // (rows * block)))


def normed_pass(
    x: Tensor,
    bias: Tensor | None,
    function: Activation,
    gated: bool,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    """As `model.layers.normed.Normed`. In at least fp32, the result alone rounded."""
    given = x, bias, weight, shift, KERNELS[function], gated, eps
    out: Tensor = _Normed.apply(*given)  # type: ignore[no-untyped-call]
    return out

"""What launches the kernels of `model/layers/activation_kernel.py`, as autograd knows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.layers.launching import Parts, column_grid, column_shape, starts, summing_grid, vector
from model.layers.transformer_config import ACTIVATIONS, Activation

KERNELS = {ACTIVATIONS[name]: name for name in ("gelu", "gelu_tanh", "relu", "relu2", "silu")}
"""Which activation of the kernel a function is."""


class _Activated(torch.autograd.Function):
    """Both passes. x: [.., f], or [.., 2 f] with a gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
        x = x.contiguous()
        f = x.shape[-1] // (1 + gated)
        n = x.numel() // x.shape[-1]
        out = x.new_empty((*x.shape[:-1], f))
        if starts("activation_forward", (x, bias), (out,)):
            from model.layers.activation_kernel import forward

            shape = column_shape(f, x.dtype)
            forward[column_grid(n, f)](x, bias, out, n, f, KIND=kind, GATED=gated, **shape)
        # A ReLU's gradient needs its result only, which the next product keeps anyway.
        plain = kind == "relu" and not gated
        ctx.save_for_backward(out if plain else x, None if plain else bias)
        ctx.kind, ctx.gated = kind, gated
        ctx.vector = vector(bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, bias = ctx.saved_tensors
        gradient, f = gradient.contiguous(), gradient.shape[-1]
        n = gradient.numel() // f
        grid = summing_grid(n, f, x.device)
        dx = torch.empty_like(x)
        parts = Parts(x, grid[0], x.shape[-1], [ctx.vector if ctx.needs_input_grad[1] else None])
        if starts("activation_backward", (gradient, x, bias), (dx,)):
            from model.layers.activation_kernel import backward

            shape = {"KIND": ctx.kind, "GATED": ctx.gated, **column_shape(f, x.dtype)}
            backward[grid](gradient, x, bias, dx, *parts.pointers, n, f, **shape)
        (d_bias,) = parts.totals()
        return dx, d_bias, None, None


def activation_pass(x: Tensor, bias: Tensor | None, function: Activation, gated: bool) -> Tensor:
    """As `model.layers.activated.activated`. In at least fp32, the result rounded once."""
    out: Tensor = _Activated.apply(x, bias, KERNELS[function], gated)  # type: ignore[no-untyped-call]
    return out

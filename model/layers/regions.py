"""What tensor-parallel ranks exchange around matrix products, for compiled code.

Megatron-core's own functions start collectives that a compiler does not follow. These are
operators of a graph: the compiler puts nothing into them and runs each where it stands, on every
rank in the same order. As Megatron-core's, they reduce the gradient of an input while that of the
weight is computed.

group: the name of a process group. A cut stream is one of sequence parallelism, [s / TP, b, h].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_sent = torch.ops._c10d_functional


def _sum(x: Tensor, group: str) -> Tensor:
    """The sum over ranks, begun; `_sent.wait_tensor` gives it."""
    begun: Tensor = _sent.all_reduce(x.contiguous(), "sum", group)
    return begun


def _gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """The pieces of all ranks along the first dimension, begun."""
    begun: Tensor = _sent.all_gather_into_tensor(x.contiguous(), ranks, group)
    return begun


def _scatter(x: Tensor, ranks: int, group: str) -> Tensor:
    """This rank's piece, along the first dimension, of the sum over ranks, begun."""
    begun: Tensor = _sent.reduce_scatter_tensor(x.contiguous(), "sum", ranks, group)
    return begun


class _Enter(torch.autograd.Function):
    """x W^T of a weight whose rows are cut over ranks.

    whole: all of x, where x is a piece of it, else x itself. Its gradient is that of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor, weight: Tensor, group: str, ranks: int) -> Tensor:
        ctx.save_for_backward(whole, weight)
        ctx.group, ctx.ranks, ctx.shape = group, ranks, x.shape
        return F.linear(whole, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        whole, weight = ctx.saved_tensors
        out, cut = gradients[0].flatten(0, 1), whole.shape != ctx.shape
        partial = out @ weight
        total = _scatter(partial, ctx.ranks, ctx.group) if cut else _sum(partial, ctx.group)
        of_weight = out.t() @ whole.flatten(0, 1)
        return _sent.wait_tensor(total).view(ctx.shape), None, of_weight, None, None


def _whole(x: Tensor, ranks: int, group: str) -> Tensor:
    whole: Tensor = _sent.wait_tensor(_gather(x, ranks, group))
    return whole


class _Leave(torch.autograd.Function):
    """The sum over ranks of what each has of an output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, ranks: int, cut: bool) -> Tensor:
        ctx.group, ctx.ranks, ctx.cut = group, ranks, cut
        total: Tensor = _sent.wait_tensor(_scatter(x, ranks, group) if cut else _sum(x, group))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (out,) = gradients
        return _sent.wait_tensor(_gather(out, ctx.ranks, ctx.group)) if ctx.cut else out, None, None, None


class _Total(torch.autograd.Function):
    """The sum over ranks, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        total: Tensor = _sent.wait_tensor(_sum(x, group))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sent.wait_tensor(_sum(gradients[0], ctx.group)), None


def product_of_rows(x: Tensor, weight: Tensor, group: Any, *, cut: bool) -> Tensor:
    """[s, b, out / TP] of the whole x [s, b, in], or of its pieces where the stream is cut.

    weight: [out / TP, in].
    """
    ranks, name = group.size(), group.group_name
    whole = x.detach()
    if cut:
        # A piece is kept and gathered again, as in Megatron-core: TP times less memory. Gathered in
        # `_Enter.backward` it would be so in the forward pass, where all of it is known, and kept.
        whole = checkpoint(_whole, whole, ranks, name, use_reentrant=False)
    product: Tensor = _Enter.apply(x, whole, weight, name, ranks)  # type: ignore[no-untyped-call]
    return product


def product_of_columns(x: Tensor, weight: Tensor, group: Any, *, cut: bool) -> Tensor:
    """[s, b, out], or its piece where the stream is cut, of x [s, b, in / TP].

    weight: [out, in / TP].
    """
    partial = F.linear(x, weight)
    total: Tensor = _Leave.apply(partial, group.group_name, group.size(), cut)  # type: ignore[no-untyped-call]
    return total


def total(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks, whose gradient is the sum of theirs. Any shape."""
    summed: Tensor = _Total.apply(x, group.group_name)  # type: ignore[no-untyped-call]
    return summed

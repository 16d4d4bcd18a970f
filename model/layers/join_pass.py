"""What launches the kernels of `model/layers/join_kernel.py`, as a function that autograd knows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.layers.joined import After, Numbers
from model.layers.launching import (
    Parts,
    ceil_div,
    programs,
    row_shape,
    row_tile,
    starts,
    vector,
    wide_format,
)


class _JoinNorm(torch.autograd.Function):
    """Both passes. Arguments of `forward` as those of `model.layers.joined.joined`."""

    @staticmethod
    def forward(
        ctx: Any,
        numbers: Numbers,
        share: Tensor | None,
        residual: Tensor | None,
        branch: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """others: bias, layer_input, and what `After` has."""
        bias, skip, weight, shift, gate = others
        branch = branch.contiguous()
        residual, skip = (None if x is None else x.contiguous() for x in (residual, skip))
        formats = [x.dtype for x in (residual, branch, skip) if x is not None]
        stream = torch.empty_like(branch, dtype=functools.reduce(torch.promote_types, formats))
        h, wide = branch.shape[-1], wide_format(stream.dtype)
        n = branch.numel() // h
        normed = means = inverses = seed = None
        entered = None if gate is None else torch.empty_like(stream)
        if weight is not None:
            normed = torch.empty_like(stream, dtype=numbers.narrow)
            inverses = stream.new_empty(n, dtype=wide)
            means = torch.empty_like(inverses) if numbers.centred else None
        if numbers.dropout:
            # From the generator that torch's own dropout draws from: recomputation repeats it.
            seed = stream.new_empty((), dtype=torch.int64).random_()
        read, made = (
            (residual, branch, bias, skip, share, seed, weight, shift, gate),
            (stream, entered, normed, means, inverses),
        )
        scales = numbers.residual_scale, numbers.branch_scale, numbers.skip_scale, numbers.dropout
        if starts("join_forward", read, made):
            from model.layers.join_kernel import forward

            after = numbers.eps, numbers.out_scale, numbers.centred
            shape = row_shape(h, wide)
            forward[(ceil_div(n, shape["ROWS"]),)](*read, *made, n, h, *scales, *after, **shape)
        ctx.set_materialize_grads(False)
        read_again = (None if weight is None else stream) if gate is None else entered
        ctx.save_for_backward(read_again, weight, means, inverses, share, seed, gate)
        ctx.numbers, ctx.wide = numbers, wide
        ctx.formats = [None if x is None else x.dtype for x in (residual, branch, skip)]
        ctx.vectors = [vector(x) for x in (weight, shift, bias, gate)]
        if normed is None or not numbers.forked:
            return stream, normed, None
        # The same memory, with a gradient of its own.
        again = normed.new_empty(0).set_(normed.untyped_storage(), 0, normed.shape, normed.stride())
        return stream, normed, again

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """gradients: of the stream, of what the norm gave, and of that again."""
        stream, weight, means, inverses, share, seed, gate = ctx.saved_tensors
        numbers: Numbers = ctx.numbers
        _, _, *asked = ctx.needs_input_grad  # residual, branch, bias, skip, weight, shift, gate
        d_stream, d_normed, d_again = (None if x is None else x.contiguous() for x in gradients)
        if d_normed is None:
            d_normed, d_again = d_again, None
        like = d_normed if d_stream is None else d_stream
        assert like is not None
        h = like.shape[-1]
        n = like.numel() // h
        own, pointers = _gradients(ctx, like, asked)
        count = min(ceil_div(n, row_tile(h)[0]), programs(like.device))
        there = asked[4] and d_normed is not None, asked[5] and d_normed is not None, asked[2]
        wanted = [one if called else None for one, called in zip(ctx.vectors[:3], there, strict=True)]
        wide = like.new_empty(0, dtype=ctx.wide)
        parts = Parts(wide, count, h, wanted)
        of_gate = Parts(wide, count, 1, [ctx.vectors[3] if asked[6] else None])
        of_norm = (None if d_normed is None else x for x in (weight, means, inverses))
        entered = stream if asked[6] or d_normed is not None else None
        read = d_stream, d_normed, d_again, entered, *of_norm, share, seed, gate
        scales = numbers.residual_scale, numbers.branch_scale, numbers.skip_scale, numbers.dropout
        if starts("join_backward", read, pointers):
            from model.layers.join_kernel import backward

            after = numbers.out_scale, numbers.centred
            summed = *parts.pointers, *of_gate.pointers
            backward[(count,)](*read, *pointers, *summed, n, h, *scales, *after, **row_shape(h, ctx.wide))
        d_weight, d_shift, d_bias = parts.totals()
        (d_gate,) = of_gate.totals()
        d_residual, d_branch, d_skip = own
        return None, None, d_residual, d_branch, d_bias, d_skip, d_weight, d_shift, d_gate


def _gradients(ctx: Any, like: Tensor, asked: list[bool]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Room for the gradients of residual, branch and layer_input, and those that the kernel writes.

    What has the same factor and format is one tensor.
    """
    numbers, plain = ctx.numbers, ctx.saved_tensors[4] is None and not ctx.numbers.dropout
    factors = (numbers.residual_scale, numbers.branch_scale if plain else None, numbers.skip_scale)
    made: dict[tuple[float | None, torch.dtype], Tensor] = {}
    own: list[Tensor | None] = []
    written: list[Tensor | None] = []
    for factor, kind, called in zip(factors, ctx.formats, (*asked[:2], asked[3]), strict=True):
        key = factor, kind
        first = called and key not in made
        if first:
            made[key] = torch.empty_like(like, dtype=kind)
        own.append(made[key] if called else None)
        written.append(made[key] if first else None)
    return own, written


def join_norm(
    residual: Tensor | None,
    branch: Tensor,
    bias: Tensor | None,
    layer_input: Tensor | None,
    share: Tensor | None,
    after: After,
    numbers: Numbers,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `model.layers.joined.joined`. Sums in at least fp32, each result rounded once."""
    given = residual, branch, bias, layer_input, *after
    made: tuple[Tensor, Tensor | None, Tensor | None] = _JoinNorm.apply(numbers, share, *given)  # type: ignore[no-untyped-call]
    return made

"""What launches the kernels of `model/layers/join_kernel.py`, as a function that autograd knows.

Importing this module needs Triton; raises ImportError without it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.layers.join_kernel import backward, forward
from model.layers.joined import Numbers

TILE = 2048
"""Elements of each tensor that a program holds at once, where a row is not longer."""
PROGRAMS = 4
"""Programs of the backward pass on a multiprocessor; each sums a part of the weights' gradients."""


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs of a backward pass at most."""
    if device.type != "cuda":
        return 3  # Triton's interpreter: each has several tiles
    return PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _shape(h: int, wide: torch.dtype) -> dict[str, Any]:
    """Rows and elements of a tile for rows of h elements, its format, and the warps on it."""
    block = max(4, triton.next_power_of_2(h))
    rows = max(1, TILE // block)
    warps = min(32, max(4, rows * block // 512))
    number = tl.float64 if wide == torch.float64 else tl.float32
    return {"WIDE": number, "ROWS": rows, "BLOCK": block, "num_warps": warps}


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
    ) -> tuple[Tensor, Tensor | None]:
        """others: bias, layer_input, weight, shift."""
        bias, skip, weight, shift = others
        branch = branch.contiguous()
        residual, skip = (None if x is None else x.contiguous() for x in (residual, skip))
        formats = [x.dtype for x in (residual, branch, skip) if x is not None]
        stream = torch.empty_like(branch, dtype=functools.reduce(torch.promote_types, formats))
        h, wide = branch.shape[-1], torch.promote_types(stream.dtype, torch.float32)
        n, shape = branch.numel() // h, _shape(h, wide)
        normed = means = inverses = seed = None
        if weight is not None:
            normed = torch.empty_like(stream, dtype=numbers.narrow)
            inverses = stream.new_empty(n, dtype=wide)
            means = torch.empty_like(inverses) if numbers.centred else None
        if numbers.dropout:
            # From the generator that torch's own dropout draws from: recomputation repeats it.
            seed = stream.new_empty((), dtype=torch.int64).random_()
        scales = numbers.residual_scale, numbers.branch_scale, numbers.skip_scale, numbers.dropout
        forward[(triton.cdiv(n, shape["ROWS"]),)](
            *(residual, branch, bias, skip, share, seed, weight, shift),
            *(stream, normed, means, inverses, n, h, *scales),
            *(numbers.eps, numbers.out_scale, numbers.centred),
            **shape,
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(None if weight is None else stream, weight, means, inverses, share, seed)
        ctx.numbers, ctx.wide = numbers, wide
        ctx.formats = [None if x is None else x.dtype for x in (residual, branch, bias, skip, weight)]
        return stream, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, weight, means, inverses, share, seed = ctx.saved_tensors
        numbers: Numbers = ctx.numbers
        _, _, *asked = ctx.needs_input_grad  # residual, branch, bias, skip, weight, shift
        d_stream, d_normed = (None if x is None else x.contiguous() for x in (d_stream, d_normed))
        like = d_normed if d_stream is None else d_stream
        assert like is not None
        h = like.shape[-1]
        n, shape = like.numel() // h, _shape(h, ctx.wide)
        own, pointers = _gradients(ctx, like, asked)
        programs = min(triton.cdiv(n, shape["ROWS"]), _programs(like.device))
        normed = d_normed is not None and any(asked[4:])
        sums = like.new_empty((3, programs, h), dtype=ctx.wide) if normed or asked[2] else None
        scales = numbers.residual_scale, numbers.branch_scale, numbers.skip_scale, numbers.dropout
        backward[(programs,)](
            *(d_stream, d_normed, stream, weight, means, inverses, share, seed),
            *(*pointers, sums, n, h, *scales, numbers.out_scale, numbers.centred, asked[2]),
            **shape,
        )
        d_weight = d_shift = d_bias = None
        if sums is not None:
            totals = (sums if asked[2] else sums[:2] if numbers.centred else sums[:1]).sum(1)
            d_weight = totals[0].to(ctx.formats[4]) if normed and asked[4] else None
            d_shift = totals[1].to(ctx.formats[4]) if normed and asked[5] else None
            d_bias = totals[2].to(ctx.formats[2]) if asked[2] else None
        d_residual, d_branch, d_skip = own
        return None, None, d_residual, d_branch, d_bias, d_skip, d_weight, d_shift


def _gradients(ctx: Any, like: Tensor, asked: list[bool]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Room for the gradients of residual, branch and layer_input, and those that the kernel writes.

    What has the same factor and format is one tensor.
    """
    numbers, plain = ctx.numbers, ctx.saved_tensors[4] is None and not ctx.numbers.dropout
    factors = (numbers.residual_scale, numbers.branch_scale if plain else None, numbers.skip_scale)
    made: dict[tuple[float | None, torch.dtype], Tensor] = {}
    own: list[Tensor | None] = []
    written: list[Tensor | None] = []
    for factor, place in zip(factors, (0, 1, 3), strict=True):
        key = factor, ctx.formats[place]
        first = asked[place] and key not in made
        if first:
            made[key] = torch.empty_like(like, dtype=ctx.formats[place])
        own.append(made[key] if asked[place] else None)
        written.append(made[key] if first else None)
    return own, written


def join_norm(
    residual: Tensor | None,
    branch: Tensor,
    bias: Tensor | None,
    layer_input: Tensor | None,
    share: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    numbers: Numbers,
) -> tuple[Tensor, Tensor | None]:
    """As `model.layers.joined.joined`. Sums in at least fp32, each result rounded once."""
    given = residual, branch, bias, layer_input, weight, shift
    both: tuple[Tensor, Tensor | None] = _JoinNorm.apply(numbers, share, *given)  # type: ignore[no-untyped-call]
    return both

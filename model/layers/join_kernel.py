"""A residual join and the norm after it as two Triton kernels, forward and backward.

For tensors [rows, h] in one piece. Sums and norms are computed in fp32, in fp64 where the tensors
are. The sum is rounded to the stream's format before it is normed, as where both are kernels of
their own. Dropout draws a seed instead of keeping a mask, and the backward pass draws the same
numbers again.

Importing this module needs Triton; raises ImportError without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.layers.activation_kernel import value_and_slope
from model.layers.norm_rows import norm_backward, norm_forward
from model.layers.parts_kernel import store_part


@triton.jit
def _kept(seed, rows, dropout, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """1 / (1 - dropout) where an element is kept and 0 where it is dropped, [ROWS, BLOCK].

    Philox gives four numbers at once: those of four neighbours.
    """
    fours = tl.arange(0, BLOCK // 4)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    a, b, c, d = tl.philox(
        tl.load(seed), fours, rows[:, None] + tl.zeros_like(fours), tl.zeros_like(fours), tl.zeros_like(fours)
    )
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (ROWS, BLOCK))
    return tl.where(tl.uint_to_uniform_float(bits) >= dropout, 1 / (1 - dropout), 0.0)


@triton.jit
def _shrunk(x, gate, place, WIDE: tl.constexpr):
    """x less silu(gate) x, rounded to the format of `place`."""
    share, _ = value_and_slope(tl.load(gate).to(WIDE), "silu")
    return (x - x * share).to(place.dtype.element_ty)


@triton.jit
def forward(
    residual,
    branch,
    bias,
    skip,
    share,
    seed,
    weight,
    shift,
    gate,
    stream,
    whole_stream,
    normed,
    means,
    inverses,
    n,
    h,
    residual_scale,
    branch_scale,
    skip_scale,
    dropout,
    eps,
    out_scale,
    CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some rows of the stream, and of it normed. A pointer is None where its tensor is.

    whole_stream: what the gate reads, where there is one.
    """
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    whole = cols < h
    inside = (rows < n)[:, None] & whole[None, :]
    at = rows.to(tl.int64)[:, None] * h + cols[None, :]
    x = tl.load(branch + at, mask=inside, other=0.0).to(WIDE)
    if bias is not None:
        x += tl.load(bias + cols, mask=whole, other=0.0).to(WIDE)[None, :]
    if share is not None:
        branch_scale = branch_scale * tl.load(share).to(WIDE)
    x = x * branch_scale
    if seed is not None:
        x = x * _kept(seed, rows, dropout, ROWS, BLOCK)
    if residual is not None:
        x += tl.load(residual + at, mask=inside, other=0.0).to(WIDE) * residual_scale
    if skip is not None:
        x += tl.load(skip + at, mask=inside, other=0.0).to(WIDE) * skip_scale
    rounded = x.to(stream.dtype.element_ty)
    if gate is not None:
        tl.store(whole_stream + at, rounded, mask=inside)
        rounded = _shrunk(rounded.to(WIDE), gate, stream, WIDE)
    tl.store(stream + at, rounded, mask=inside)
    if normed is not None:
        x = rounded.to(WIDE)
        x = norm_forward(x, weight, shift, means, inverses, rows, cols, n, h, eps, CENTRED)
        tl.store(normed + at, (x * out_scale).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    d_stream,
    d_normed,
    d_again,
    stream,
    weight,
    means,
    inverses,
    share,
    seed,
    gate,
    d_residual,
    d_branch,
    d_skip,
    weight_parts,
    shift_parts,
    bias_parts,
    gate_parts,
    n,
    h,
    residual_scale,
    branch_scale,
    skip_scale,
    dropout,
    out_scale,
    CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of every so many rows, and this program's part of those of weight, shift and bias.

    d_normed, d_again: of both tensors that hold what the norm gave, if there are two.
    stream: what was normed, or what the gate read: it lets the gradient pass as it is.
    weight_parts, shift_parts, bias_parts: [programs, h]; gate_parts: [programs, 1].
    A pointer is None where nobody asks for its tensor.
    """
    cols = tl.arange(0, BLOCK)
    whole = cols < h
    d_weight = tl.zeros((ROWS, BLOCK), WIDE)
    d_shift, d_bias = d_weight, d_weight
    d_gate = tl.zeros((ROWS,), WIDE)
    if share is not None:
        branch_scale = branch_scale * tl.load(share).to(WIDE)
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & whole[None, :]
        at = rows.to(tl.int64)[:, None] * h + cols[None, :]
        dx = tl.zeros((ROWS, BLOCK), WIDE)
        if d_normed is not None:
            g = tl.load(d_normed + at, mask=inside, other=0.0).to(WIDE)
            if d_again is not None:
                g += tl.load(d_again + at, mask=inside, other=0.0).to(WIDE)
            g = g * out_scale
        if stream is not None:
            x = tl.load(stream + at, mask=inside, other=0.0).to(WIDE)
            entered = x
            if gate is not None:
                x = _shrunk(x, gate, stream, WIDE).to(WIDE)
        if d_normed is not None:
            dx, x = norm_backward(g, x, weight, means, inverses, rows, cols, n, h, CENTRED)
            d_weight += g * x
            if CENTRED:
                d_shift += g
        if d_stream is not None:
            dx += tl.load(d_stream + at, mask=inside, other=0.0).to(WIDE)
        if gate_parts is not None:
            d_gate += tl.sum(dx * entered, 1)
        if d_residual is not None:
            tl.store(d_residual + at, (dx * residual_scale).to(d_residual.dtype.element_ty), mask=inside)
        if d_skip is not None:
            tl.store(d_skip + at, (dx * skip_scale).to(d_skip.dtype.element_ty), mask=inside)
        dx = dx * branch_scale
        if seed is not None:
            dx = dx * _kept(seed, rows, dropout, ROWS, BLOCK)
        if d_branch is not None:
            tl.store(d_branch + at, dx.to(d_branch.dtype.element_ty), mask=inside)
        if bias_parts is not None:
            d_bias += tl.where(inside, dx, 0.0)
    store_part(weight_parts, d_weight, cols, h, h)
    store_part(shift_parts, d_shift, cols, h, h)
    store_part(bias_parts, d_bias, cols, h, h)
    if gate_parts is not None:
        _, slope = value_and_slope(tl.load(gate).to(WIDE), "silu")
        tl.store(gate_parts + tl.program_id(0), -tl.sum(d_gate, 0) * slope)

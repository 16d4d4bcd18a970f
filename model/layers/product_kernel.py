"""Matrix products of a feed-forward with its activation inside, as two Triton kernels.

Forward, the first product: its result enters the activation before it leaves the registers.
Backward, the product that is the gradient of what the second one read: it is multiplied by the
activation's derivative there. All is summed in fp32, in fp64 where the tensors are.

Importing this module needs Triton; raises ImportError without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.layers.activation_kernel import gradient_before, value_and_slope


@triton.jit
def _row_tile(x, rows, deep, n, k):
    """Some rows of x [n, k], 0 beyond it."""
    inside = (rows < n)[:, None] & (deep < k)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * k + deep[None, :], mask=inside, other=0.0)


@triton.jit
def _column_tile(weight, at_deep, at_cols, deep, cols, k, columns):
    """Some columns of a matrix [k, columns] that lies at these steps, 0 beyond it."""
    inside = (deep < k)[:, None] & (cols < columns)[None, :]
    places = deep.to(tl.int64)[:, None] * at_deep + cols.to(tl.int64)[None, :] * at_cols
    return tl.load(weight + places, mask=inside, other=0.0)


@triton.jit
def _times(a, b, sums, WIDENED: tl.constexpr):
    """sums + a b. In fp32 as exact as its format.

    WIDENED: for Triton's interpreter, which multiplies no numbers in bf16.
    """
    if WIDENED:
        a, b = a.to(sums.dtype), b.to(sums.dtype)
    return tl.dot(a, b, sums, input_precision="ieee", out_dtype=sums.dtype)


@triton.jit
def forward(
    x,
    weight,
    bias,
    inner,
    out,
    n,
    k,
    f,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDENED: tl.constexpr,
):
    """A tile of x [n, k] times weight [f, k], or [2 f, k] with a gate, and its activation.

    inner: the product with its bias, for the backward pass; None where that does not read it.
    The activation is that of the rounded product, as its derivative is.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    whole = cols < f
    inside = (rows < n)[:, None] & whole[None, :]
    far = rows.to(tl.int64)[:, None]
    sums = tl.zeros((ROWS, BLOCK), WIDE)
    other = sums
    for start in range(0, k, DEPTH):
        deep = start + tl.arange(0, DEPTH)
        tile = _row_tile(x, rows, deep, n, k)
        sums = _times(tile, _column_tile(weight, 1, k, deep, cols, k, f), sums, WIDENED)
        if GATED:
            other = _times(tile, _column_tile(weight, 1, k, deep, f + cols, k, 2 * f), other, WIDENED)
    width = 2 * f if GATED else f
    at = far * width + cols[None, :]
    if bias is not None:
        sums += tl.load(bias + cols, mask=whole, other=0.0).to(WIDE)[None, :]
        if GATED:
            other += tl.load(bias + f + cols, mask=whole, other=0.0).to(WIDE)[None, :]
    rounded = sums.to(out.dtype.element_ty)
    value, _ = value_and_slope(rounded.to(WIDE), KIND)
    if inner is not None:
        tl.store(inner + at, rounded, mask=inside)
    if GATED:
        rounded = other.to(out.dtype.element_ty)
        value *= rounded.to(WIDE)
        tl.store(inner + at + f, rounded, mask=inside)
    tl.store(out + far * f + cols[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    gradient,
    weight,
    inner,
    d_inner,
    bias_parts,
    n,
    k,
    f,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDENED: tl.constexpr,
):
    """Some columns of every so many rows of gradient [n, k] times weight [k, f], by the slope.

    inner: what `forward` gave, or its result where that gave none.
    bias_parts: this program's part of the bias's gradient in [programs, f], or 2 f with a gate;
        None where nobody asks for it.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    whole = cols < f
    width = 2 * f if GATED else f
    of_bias = tl.zeros((BLOCK,), WIDE)
    of_other = of_bias
    for first in range(tl.program_id(1) * ROWS, n, tl.num_programs(1) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & whole[None, :]
        far = rows.to(tl.int64)[:, None]
        sums = tl.zeros((ROWS, BLOCK), WIDE)
        for start in range(0, k, DEPTH):
            deep = start + tl.arange(0, DEPTH)
            tile = _row_tile(gradient, rows, deep, n, k)
            sums = _times(tile, _column_tile(weight, f, 1, deep, cols, k, f), sums, WIDENED)
        at = far * width + cols[None, :]
        own, other = gradient_before(sums, inner, None, d_inner, at, cols, inside, f, KIND, GATED, WIDE)
        of_bias += tl.sum(own, 0)
        if GATED:
            of_other += tl.sum(other, 0)
    if bias_parts is not None:
        mine = bias_parts + tl.program_id(1) * width + cols
        tl.store(mine, of_bias, mask=whole)
        if GATED:
            tl.store(mine + f, of_other, mask=whole)

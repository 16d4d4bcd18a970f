"""A bias, the activation after it with its gate, and the norm of that, as two Triton kernels.

For tensors [n, f] in one piece, or [n, 2 f] with a gate, as `model/layers/activation_kernel.py` has
them. A program has whole rows. All is computed in fp32, in fp64 where the tensors are; the backward
pass computes the activation again.

Importing this module needs Triton; raises ImportError without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.layers.activation_kernel import activated, load_biased, value_and_slope
from model.layers.norm_rows import norm_backward, norm_forward
from model.layers.parts_kernel import store_part


@triton.jit
def forward(
    x,
    bias,
    weight,
    shift,
    out,
    means,
    inverses,
    n,
    f,
    eps,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some rows, and their statistics [n]. A pointer is None where its tensor is."""
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    whole = cols < f
    inside = (rows < n)[:, None] & whole[None, :]
    far = rows.to(tl.int64)[:, None]
    at = far * (2 * f if GATED else f) + cols[None, :]
    value = activated(x, bias, at, cols, inside, f, KIND, GATED, WIDE)
    made = norm_forward(value, weight, shift, means, inverses, rows, cols, n, f, eps, CENTRED)
    tl.store(out + far * f + cols[None, :], made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    gradient,
    x,
    bias,
    weight,
    means,
    inverses,
    dx,
    weight_parts,
    shift_parts,
    bias_parts,
    n,
    f,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every so many rows, and this program's part of the gradients of gain, offset and bias.

    weight_parts, shift_parts: [programs, f]; bias_parts: the same, or 2 f with a gate.
    A pointer is None where nobody asks for its tensor.
    """
    cols = tl.arange(0, BLOCK)
    whole = cols < f
    width = 2 * f if GATED else f
    d_weight = tl.zeros((ROWS, BLOCK), WIDE)
    d_shift, d_bias, d_other = d_weight, d_weight, d_weight
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & whole[None, :]
        far = rows.to(tl.int64)[:, None]
        at = far * width + cols[None, :]
        g = tl.load(gradient + far * f + cols[None, :], mask=inside, other=0.0).to(WIDE)
        value, slope = value_and_slope(load_biased(x, bias, at, cols, inside, whole, WIDE), KIND)
        normed = value
        if GATED:
            other = load_biased(x, bias, at + f, f + cols, inside, whole, WIDE)
            normed = value * other
        own, normed = norm_backward(g, normed, weight, means, inverses, rows, cols, n, f, CENTRED)
        d_weight += g * normed
        if shift_parts is not None:
            d_shift += g
        if GATED:
            gate = own * value
            own *= other
            tl.store(dx + at + f, gate.to(dx.dtype.element_ty), mask=inside)
            if bias_parts is not None:
                d_other += gate
        own *= slope
        tl.store(dx + at, own.to(dx.dtype.element_ty), mask=inside)
        if bias_parts is not None:
            d_bias += own
    store_part(weight_parts, d_weight, cols, f, f)
    store_part(shift_parts, d_shift, cols, f, f)
    store_part(bias_parts, d_bias, cols, f, width)
    if GATED and bias_parts is not None:
        store_part(bias_parts + f, d_other, cols, f, width)

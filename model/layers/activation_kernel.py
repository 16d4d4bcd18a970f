"""A bias and the activation after it, with its gate, as two Triton kernels, forward and backward.

For tensors [n, f] in one piece, or [n, 2 f] with a gate: the activated half, then the other. All is
computed in fp32, in fp64 where the tensors are.

Importing this module needs Triton; raises ImportError without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.layers.parts_kernel import store_part

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)
"""Of a standard Gaussian at 0."""
TANH_RATE, TANH_CUBE = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)
"""Of GELU's approximation: 2 sqrt(2 / pi), and the share of the cube."""


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """An activation and its derivative, which is 0 where a ReLU's input is 0."""
    if KIND == "gelu":
        share = 0.5 * (1 + tl.erf(x * ROOT_HALF))
        value = x * share
        slope = share + x * DENSITY * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        cube = x * x * TANH_CUBE
        rest = tl.exp(tl.minimum(-(x + x * cube) * TANH_RATE, 80.0))
        share = 1 / (1 + rest)
        value = x * share
        slope = share + value * (rest * share) * (1 + 3 * cube) * TANH_RATE
    elif KIND == "silu":
        share = 1 / (1 + tl.exp(-x))
        value = x * share
        slope = share + value * (1 - share)
    else:
        value = tl.where(x <= 0, 0.0, x)  # what is no number stays none
        slope = tl.where(x <= 0, 0.0, 1.0)
        if KIND == "relu2":
            slope = 2 * value
            value = value * value
    return value, slope


@triton.jit
def load_biased(pointer, bias, at, cols, inside, whole, WIDE: tl.constexpr):
    """Numbers at `at`, plus those of a bias at `cols`; bias: None where there is none."""
    x = tl.load(pointer + at, mask=inside, other=0.0).to(WIDE)
    if bias is not None:
        x += tl.load(bias + cols, mask=whole, other=0.0).to(WIDE)[None, :]
    return x


@triton.jit
def activated(x, bias, at, cols, inside, f, KIND: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr):
    """The activation of x at `at`, times what lies f further with a gate."""
    whole = cols < f
    value, _ = value_and_slope(load_biased(x, bias, at, cols, inside, whole, WIDE), KIND)
    if GATED:
        value *= load_biased(x, bias, at + f, f + cols, inside, whole, WIDE)
    return value


@triton.jit
def gradient_before(
    g,
    x,
    bias,
    dx,
    at,
    cols,
    inside,
    f,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradients of what enters an activation and its gate, of g, which are stored at `dx`.

    Without a gate both are the first.
    """
    whole = cols < f
    value, slope = value_and_slope(load_biased(x, bias, at, cols, inside, whole, WIDE), KIND)
    if GATED:
        other = g * value
        g *= load_biased(x, bias, at + f, f + cols, inside, whole, WIDE)
        tl.store(dx + at + f, other.to(dx.dtype.element_ty), mask=inside)
    own = g * slope
    tl.store(dx + at, own.to(dx.dtype.element_ty), mask=inside)
    return own, other if GATED else own


@triton.jit
def forward(
    x,
    bias,
    out,
    n,
    f,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of some rows. bias: None where there is none."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < n)[:, None] & (cols < f)[None, :]
    far = rows.to(tl.int64)[:, None]
    at = far * (2 * f if GATED else f) + cols[None, :]
    value = activated(x, bias, at, cols, inside, f, KIND, GATED, WIDE)
    tl.store(out + far * f + cols[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    gradient,
    x,
    bias,
    dx,
    bias_parts,
    n,
    f,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of every so many rows, and this program's part of the bias's gradient.

    bias_parts: [programs, f], or 2 f with a gate; None where nobody asks for it.
    """
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = 2 * f if GATED else f
    sums = tl.zeros((ROWS, BLOCK), WIDE)
    other_sums = sums
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & (cols < f)[None, :]
        far = rows.to(tl.int64)[:, None]
        at = far * width + cols[None, :]
        g = tl.load(gradient + far * f + cols[None, :], mask=inside, other=0.0).to(WIDE)
        own, other = gradient_before(g, x, bias, dx, at, cols, inside, f, KIND, GATED, WIDE)
        sums += own
        if GATED:
            other_sums += other
    store_part(bias_parts, sums, cols, f, width)
    if GATED and bias_parts is not None:
        store_part(bias_parts + f, other_sums, cols, f, width)

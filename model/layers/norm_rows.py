"""A norm over whole rows as parts of Triton kernels, forward and backward.

For tiles [ROWS, BLOCK] of rows of h elements, in the format that a kernel computes in.

Importing this module needs Triton; raises ImportError without it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward(x, weight, shift, means, inverses, rows, cols, n, h, eps, CENTRED: tl.constexpr):
    """x normed, times a gain and plus an offset; a row's statistics are stored.

    x: 0 beyond its h columns. shift, and without CENTRED means: None where there is none.
    """
    held, whole = rows < n, cols < h
    if CENTRED:
        mean = tl.sum(x, 1) / h
        tl.store(means + rows, mean, mask=held)
        x = tl.where(held[:, None] & whole[None, :], x - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(x * x, 1) / h + eps)
    tl.store(inverses + rows, inverse, mask=held)
    x = x * inverse[:, None] * tl.load(weight + cols, mask=whole, other=0.0).to(x.dtype)[None, :]
    if shift is not None:
        x += tl.load(shift + cols, mask=whole, other=0.0).to(x.dtype)[None, :]
    return x


@triton.jit
def norm_backward(g, x, weight, means, inverses, rows, cols, n, h, CENTRED: tl.constexpr):
    """Gradient of what was normed, and the input without mean and size, [ROWS, BLOCK] each.

    g: of what the norm gave, 0 beyond its h columns; x: its input.
    """
    held, whole = rows < n, cols < h
    if CENTRED:
        x = x - tl.load(means + rows, mask=held, other=0.0)[:, None]
    inverse = tl.load(inverses + rows, mask=held, other=0.0)[:, None]
    x = tl.where(held[:, None] & whole[None, :], x * inverse, 0.0)
    own = g * tl.load(weight + cols, mask=whole, other=0.0).to(g.dtype)[None, :]
    dx = own - x * (tl.sum(own * x, 1) / h)[:, None]
    if CENTRED:
        dx = dx - (tl.sum(own, 1) / h)[:, None]
    return dx * inverse, x

"""Sums over the parts that programs made of gradients of vectors, as a Triton kernel.

Importing this module needs Triton; raises ImportError without it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def total(parts, first, second, third, programs, h, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the programs of [vectors, programs, h], some columns of one vector.

    first, second, third: [h] in any format, None beyond the number of vectors.
    """
    cols, vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    whole = cols < h
    own = parts + vector.to(tl.int64) * programs * h
    sums = tl.zeros((ROWS, BLOCK), parts.dtype.element_ty)
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < programs)[:, None] & whole[None, :]
        sums += tl.load(own + rows[:, None] * h + cols[None, :], mask=inside, other=0.0)
    column = tl.sum(sums, 0)
    tl.store(first + cols, column.to(first.dtype.element_ty), mask=cols < tl.where(vector == 0, h, 0))
    if second is not None:
        tl.store(second + cols, column.to(second.dtype.element_ty), mask=cols < tl.where(vector == 1, h, 0))
    if third is not None:
        tl.store(third + cols, column.to(third.dtype.element_ty), mask=cols < tl.where(vector == 2, h, 0))

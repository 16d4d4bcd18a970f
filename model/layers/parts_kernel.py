"""Parts that programs make of gradients of vectors, and sums over them, as a Triton kernel.

Importing this module needs Triton; raises ImportError without it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_part(parts, sums, cols, h, width):
    """What this program has summed of a vector's gradient, [ROWS, BLOCK], some h of its columns.

    parts: [programs, width], None where nobody asks for it.
    """
    if parts is not None:
        tl.store(parts + tl.program_id(0) * width + cols, tl.sum(sums, 0), mask=cols < h)


@triton.jit
def _give(place, cols, column, mine, ADDED: tl.constexpr):
    if ADDED:
        column += tl.load(place + cols, mask=mine, other=0.0).to(column.dtype)
    tl.store(place + cols, column.to(place.dtype.element_ty), mask=mine)


@triton.jit
def total(
    parts,
    first,
    second,
    third,
    programs,
    h,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the programs of [vectors, programs, h], some columns of one vector.

    first, second, third: [h] in any format, None beyond the number of vectors. With ADDED the sums
    are added to what is there.
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
    _give(first, cols, column, cols < tl.where(vector == 0, h, 0), ADDED)
    if second is not None:
        _give(second, cols, column, cols < tl.where(vector == 1, h, 0), ADDED)
    if third is not None:
        _give(third, cols, column, cols < tl.where(vector == 2, h, 0), ADDED)

"""Queries, keys and values out of one product, turned, as two Triton kernels, forward and backward.

Columns of a group: its query heads, then its key, then its value, `width` each.

Importing this module needs Triton; raises ImportError without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.layers.parts_kernel import store_part


@triton.jit
def _places(cols, per_group, width):
    """Of columns: (place of the head in its group, number of the group, entry of the head)."""
    slots = cols // width
    return slots % (per_group + 2), slots // (per_group + 2), cols % width


@triton.jit
def forward(
    product,
    table,
    query,
    key,
    n,
    batch,
    groups,
    per_group,
    width,
    turning,
    table_s,
    table_b,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turned queries [n, groups per_group width] and keys [n, groups width], some of them.

    product: [n, groups (per_group + 2) width].
    table: cosines, then sines of `turning` entries each, whose first half is negative.
    table_s, table_b: its strides by position and sample.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns, half = groups * (per_group + 2) * width, turning // 2
    place, group, entry = _places(cols, per_group, width)
    inside = (rows < n)[:, None] & ((cols < columns) & (place <= per_group))[None, :]
    far = rows.to(tl.int64)[:, None]
    x = tl.load(product + far * columns + cols[None, :], mask=inside, other=0.0).to(WIDE)
    turns = inside & (entry < turning)[None, :]
    other = tl.where(entry < half, cols + half, cols - half)
    y = tl.load(product + far * columns + other[None, :], mask=turns, other=0.0).to(WIDE)
    angle = table + (rows // batch * table_s + rows % batch * table_b)[:, None] + entry[None, :]
    x *= tl.load(angle, mask=turns, other=1.0).to(WIDE)
    x += y * tl.load(angle + turning, mask=turns, other=0.0).to(WIDE)
    at = far * (groups * per_group * width) + ((group * per_group + place) * width + entry)[None, :]
    tl.store(query + at, x.to(query.dtype.element_ty), mask=inside & (place < per_group)[None, :])
    at = far * (groups * width) + (group * width + entry)[None, :]
    tl.store(key + at, x.to(key.dtype.element_ty), mask=inside & (place == per_group)[None, :])


@triton.jit
def _gradient(query, key, value, starts, heads, entry, inside, place, per_group, WIDE: tl.constexpr):
    """Of each column the gradient of what was made of it.

    starts: of rows, [ROWS, 1], and heads: of columns, [1, BLOCK], in each of the three tensors.
    """
    far = entry[None, :]
    of_query = inside & (place < per_group)[None, :]
    of_key, of_value = inside & (place == per_group)[None, :], inside & (place > per_group)[None, :]
    x = tl.load(query + starts[0] + heads[0] + far, mask=of_query, other=0.0).to(WIDE)
    x += tl.load(key + starts[1] + heads[1] + far, mask=of_key, other=0.0).to(WIDE)
    return x + tl.load(value + starts[2] + heads[2] + far, mask=of_value, other=0.0).to(WIDE)


@triton.jit
def backward(
    query,
    key,
    value,
    table,
    product,
    bias_parts,
    n,
    batch,
    groups,
    per_group,
    width,
    turning,
    table_s,
    table_b,
    query_s,
    query_b,
    query_h,
    key_s,
    key_b,
    key_h,
    value_s,
    value_b,
    value_h,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the product, some columns of every so many rows, and of its bias a part.

    query, key, value: gradients [s, b, heads, width], with strides of all but the last dimension.
    table: None where nothing was turned. bias_parts: [programs, columns], or None.
    """
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns, half = groups * (per_group + 2) * width, turning // 2
    place, group, entry = _places(cols, per_group, width)
    whole = cols < columns
    own, head = group.to(tl.int64)[None, :], (group * per_group + place).to(tl.int64)[None, :]
    heads = head * query_h, own * key_h, own * value_h
    other = tl.where(entry < half, entry + half, entry - half)
    turned = whole & (place <= per_group) & (entry < turning)
    sums = tl.zeros((ROWS, BLOCK), WIDE)
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & whole[None, :]
        position, sample = (rows // batch).to(tl.int64)[:, None], (rows % batch).to(tl.int64)[:, None]
        starts = (
            position * query_s + sample * query_b,
            position * key_s + sample * key_b,
            position * value_s + sample * value_b,
        )
        x = _gradient(query, key, value, starts, heads, entry, inside, place, per_group, WIDE)
        if table is not None:
            turns = (rows < n)[:, None] & turned[None, :]
            angle = table + position * table_s + sample * table_b
            y = _gradient(query, key, value, starts, heads, other, turns, place, per_group, WIDE)
            x *= tl.load(angle + entry[None, :], mask=turns, other=1.0).to(WIDE)
            x += y * tl.load(angle + turning + other[None, :], mask=turns, other=0.0).to(WIDE)
        at = rows.to(tl.int64)[:, None] * columns + cols[None, :]
        tl.store(product + at, x.to(product.dtype.element_ty), mask=inside)
        sums += x
    store_part(bias_parts, sums, cols, columns, columns)

"""What passes with kernels of our own share: tiles, programs, sums of their parts.

On tensors without memory a kernel is noted instead of started, as an operator that reads and writes
what the kernel would (`model/cost/operators.py`). Only what starts kernels imports Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import custom_op
from torch.utils.flop_counter import register_flop_formula

TILE = 2048
"""Elements of each tensor that a program holds at once, where a row is not longer."""
COLUMNS = 256
"""Of a tile, where not all are needed at once."""
PROGRAMS = 4
"""Programs of a backward pass on a multiprocessor; each sums a part of the vectors' gradients."""
MULTIPROCESSORS = 132
"""Of an H100, which stands for the GPU where kernels are only noted."""
PARTS = 64
"""Rows and columns of the parts that a program sums at once."""


def wide_format(dtype: torch.dtype) -> torch.dtype:
    """What kernels compute in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def programs(device: torch.device) -> int:
    """Programs of a backward pass at most."""
    if device.type == "meta":
        return PROGRAMS * MULTIPROCESSORS
    if device.type != "cuda":
        return 3  # Triton's interpreter: each has several tiles
    return PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)


def ceil_div(count: int, size: int) -> int:
    """Pieces of a size that hold so many."""
    return -(-count // size)


def power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@functools.cache
def row_tile(h: int) -> tuple[int, int]:
    """Rows and elements of a row of a tile that holds whole rows of h elements."""
    block = max(4, power(h))
    return max(1, TILE // block), block


def column_tile(columns: int, size: int = TILE) -> tuple[int, int]:
    """Rows and columns of a tile where columns do not depend on each other."""
    block = min(COLUMNS, max(4, power(columns)))
    return size // block, block


def row_warps(rows: int, block: int) -> int:
    """On a tile of whole rows: as many as keep registers from spilling."""
    elements = rows * block
    return 32 if elements > 8192 else min(16, max(4, elements // 256))


def column_warps(rows: int, block: int) -> int:
    """On a tile of columns. Fewer elements a thread leave registers for sums of two halves."""
    return max(1, rows * block // 256)


@functools.cache
def triton_format(wide: torch.dtype) -> Any:
    """Triton's word for fp64 or fp32."""
    import triton.language as tl

    return tl.float64 if wide == torch.float64 else tl.float32


def row_shape(h: int, dtype: torch.dtype) -> dict[str, Any]:
    """What kernels on tiles of whole rows of h elements are compiled for."""
    rows, block = row_tile(h)
    warps = row_warps(rows, block)
    return {"WIDE": triton_format(wide_format(dtype)), "ROWS": rows, "BLOCK": block, "num_warps": warps}


def column_shape(columns: int, dtype: torch.dtype, size: int = TILE) -> dict[str, Any]:
    """What kernels on tiles of columns are compiled for: a tile, its format, the warps on it."""
    rows, block = column_tile(columns, size)
    warps = column_warps(rows, block)
    return {"WIDE": triton_format(wide_format(dtype)), "ROWS": rows, "BLOCK": block, "num_warps": warps}


def product_shape(rows: Tensor, *, gated: bool) -> dict[str, int]:
    """What kernels that multiply matrices of a format are compiled for, by what limits them.

    In 16 bits two programs share a multiprocessor's memory and registers; a gate has two sums.
    """
    if rows.is_cpu:
        return {"ROWS": 32, "BLOCK": 32, "DEPTH": 16, "WIDENED": True}  # Triton's interpreter: several
    made = {"BLOCK": 64 if gated else 128, "WIDENED": False}
    if rows.element_size() > 2:
        return made | {"ROWS": 32, "DEPTH": 16, "num_warps": 4}
    return made | {"ROWS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def column_grid(n: int, columns: int, size: int = TILE) -> tuple[int, int]:
    """Programs over n rows and over columns, of which each has one tile."""
    rows, block = column_tile(columns, size)
    return ceil_div(n, rows), ceil_div(columns, block)


def summing_grid(n: int, columns: int, device: torch.device, size: int = TILE) -> tuple[int, int]:
    """The same of a backward pass, in which a program sums over many tiles of rows."""
    tiles, blocks = column_grid(n, columns, size)
    return min(tiles, ceil_div(programs(device), blocks)), blocks


@functools.cache
def _operator(name: str) -> Callable[[list[Tensor], list[Tensor], list[Tensor]], None]:
    def noted(factors: Sequence[Tensor], read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Nothing: what would be computed has no memory."""

    def flops(factors: Sequence[Sequence[int]], *beside: object, **given: object) -> int:
        """Of rows [.., k] and a matrix of which one side is k long, by their shapes."""
        return 2 * math.prod(map(math.prod, factors)) // factors[0][-1] if factors else 0

    operator = custom_op(
        f"fathom::{name}",
        noted,
        mutates_args=("written",),
        schema="(Tensor[] factors, Tensor[] read, Tensor(a!)[] written) -> ()",
    )
    operator.register_fake(noted)
    register_flop_formula(getattr(torch.ops.fathom, name))(flops)
    return operator


def starts(
    name: str,
    read: Sequence[Tensor | None],
    written: Sequence[Tensor | None],
    factors: tuple[Tensor, ...] = (),
) -> bool:
    """Whether to start a kernel of this name. Where tensors have no memory it is noted instead.

    read, written: its tensors; those that are None do not count.
    factors: of a kernel that multiplies matrices: rows [.., k], and a matrix of which one side is k
        long. It reads others beside them, and first writes what a plain product would.
    """
    first = next(tensor for tensor in (*written, *read) if tensor is not None)
    if not first.is_meta:
        return True
    reads, writes = ([x for x in given if x is not None] for given in (read, written))
    _operator(name)(list(factors), reads, writes)
    return False


class Vector(NamedTuple):
    """A vector [h] whose gradient a pass sums."""

    format: torch.dtype
    total: Tensor | None
    """What the gradient is added to, None where autograd takes it (`model/layers/products.py`)."""


def vector(parameter: Tensor | None) -> Vector | None:
    """What a pass has to know of a parameter [h] for its gradient."""
    if parameter is None:
        return None
    total = getattr(parameter, "main_grad", None) if getattr(parameter, "added_in_pass", False) else None
    return Vector(parameter.dtype, total)


class Parts:
    """Room for what each program sums of the gradients of up to three vectors [h].

    vectors: None where nobody asks for a gradient.
    """

    def __init__(self, like: Tensor, count: int, h: int, vectors: Sequence[Vector | None]) -> None:
        self.asked, self.h = list(vectors), h
        number = sum(one is not None for one in vectors)
        wide = wide_format(like.dtype)
        self.room = like.new_empty((number, count, h), dtype=wide) if number else None

    @property
    def pointers(self) -> list[Tensor | None]:
        """[programs, h] for each vector, None where nobody asks for its gradient."""
        rows = iter(() if self.room is None else self.room.unbind())
        return [None if one is None else next(rows) for one in self.asked]

    def totals(self) -> list[Tensor | None]:
        """The gradients [h], each in its format, rounded once.

        None where it was added to what its vector has for it; so it is of all of them, or of none.
        """
        if self.room is None:
            return [None] * len(self.asked)
        asked = [one for one in self.asked if one is not None]
        added = all(one.total is not None for one in asked)
        given = [
            one.total if added and one.total is not None else self.room.new_empty(self.h, dtype=one.format)
            for one in asked
        ]
        # Written by the pass before and read here. Noted in one place: no batch makes them larger.
        if starts("sum_parts", [self.room, *(given if added else ())], [self.room, *given]):
            from model.layers.parts_kernel import total

            places = (*given, None, None)[:3]
            grid = ceil_div(self.h, PARTS), len(given)
            sizes = self.room.shape[1], self.h
            total[grid](self.room, *places, *sizes, ADDED=added, ROWS=PARTS, BLOCK=PARTS)
        made = iter(given)
        own = [None if one is None else next(made) for one in self.asked]
        return [None] * len(own) if added else own

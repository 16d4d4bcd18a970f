"""Where a rank's part of a tensor sits in the whole one: plain data, with the slicing both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what only looks at checkpoint folders does without PyTorch
    from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts along dimension `dim`.

    Raises ValueError for an index outside the count, or a count or stride below 1.
    """

    dim: int | None
    """None where every rank has the whole tensor."""
    index: int
    count: int
    stride: int = 1
    """Equal blocks, end to end, of the whole dimension; a part holds its piece of each, in order.

    2 is a gated feed-forward: the whole is [gate; up], a part is [piece of gate; piece of up].
    """

    def __post_init__(self) -> None:
        if self.count < 1 or self.stride < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"{self} is no part of a tensor: it needs 0 <= index < count and stride >= 1")
        if self.dim is None and self.count != 1:
            raise ValueError(f"{self} splits a tensor into {self.count} parts without naming a dimension")


WHOLE = Shard(None, 0, 1)


def full_shape(local_shape: Sequence[int], shard: Shard) -> tuple[int, ...]:
    """Shape of the whole tensor, from the shape of a part."""
    shape = list(local_shape)
    if shard.dim is not None:
        shape[shard.dim] *= shard.count
    return tuple(shape)


def take(full: Tensor, shard: Shard) -> Tensor:
    """The part of a whole tensor: a view where the part is contiguous in it, else a copy.

    Raises ValueError where the dimension does not divide.
    """
    if shard.dim is None:
        return full
    return _blocks(full, shard).select(shard.dim + 1, shard.index).flatten(shard.dim, shard.dim + 1)


def put(full: Tensor, local: Tensor, shard: Shard) -> None:
    """Writes a part into its place in a whole tensor, the inverse of `take`.

    Raises ValueError where the dimension does not divide.
    """
    if shard.dim is None:
        full.copy_(local)
        return
    target = _blocks(full, shard).select(shard.dim + 1, shard.index)
    target.copy_(local.view(target.shape) if local.is_contiguous() else local.reshape(target.shape))


def _blocks(full: Tensor, shard: Shard) -> Tensor:
    """View of `full` whose dimension `dim` is split into (stride, count, rest)."""
    dim = shard.dim or 0
    size, parts = full.shape[dim], shard.stride * shard.count
    if size % parts:
        raise ValueError(
            f"dimension {dim} of a tensor of shape {tuple(full.shape)} does not divide into "
            f"{shard.stride} x {shard.count} parts"
        )
    return full.view(*full.shape[:dim], shard.stride, shard.count, size // parts, *full.shape[dim + 1 :])

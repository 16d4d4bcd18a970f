"""Which matrices lie in one tensor, and where: data that takes it apart and puts it together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.depth.scheme import WeightRole

if TYPE_CHECKING:  # sizes are counted without PyTorch
    from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The rows of a linear layer's weight or bias as `repeats` equal stretches end to end.

    Each stretch holds one block of every matrix, in order.
    """

    shares: tuple[tuple[WeightRole, int], ...]
    """Role of each matrix, and its part of a stretch in units that all matrices share."""
    repeats: int = 1

    @property
    def roles(self) -> tuple[WeightRole, ...]:
        """Roles in the tensor, each once: a gate and its up projection are both fc1."""
        return tuple(dict.fromkeys(role for role, _ in self.shares))

    def unit(self, rows: int) -> int:
        """Rows of one unit of a share. Raises ValueError for rows that do not divide."""
        units = self.repeats * sum(share for _, share in self.shares)
        if rows % units:
            raise ValueError(f"{rows} rows do not divide into {units} equal parts of {self}")
        return rows // units

    def rows(self, rows: int) -> tuple[int, ...]:
        """Rows of each matrix in a tensor of so many. Raises ValueError as `unit`."""
        unit = self.unit(rows)
        return tuple(self.repeats * share * unit for _, share in self.shares)

    def views(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Each matrix in a tensor [rows, ...], as a view [repeats, share, unit, ...]."""
        shares = [share for _, share in self.shares]
        unit = self.unit(whole.shape[0])
        stretches = whole.view(self.repeats, sum(shares), unit, *whole.shape[1:])
        ends = itertools.accumulate(shares)
        return tuple(stretches.narrow(1, end - share, share) for end, share in zip(ends, shares, strict=True))

    def by_role(self, whole: Tensor) -> dict[WeightRole, Tensor]:
        """What each role has in a tensor [rows, ...].

        A view [repeats, share, unit, ...], or the tensor itself where all of it has one role.
        """
        if len(self.roles) == 1:
            return {self.roles[0]: whole}
        return dict(zip(self.roles, self.views(whole), strict=True))

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Each matrix of a tensor [rows, ...] by itself, its blocks end to end: [own rows, ...]."""
        return tuple(view.reshape(-1, *whole.shape[1:]) for view in self.views(whole))

    def join(self, matrices: Sequence[Tensor]) -> Tensor:
        """The tensor [rows, ...] of matrices [own rows, ...], the inverse of `split`."""
        import torch

        stretches = [matrix.reshape(self.repeats, -1, *matrix.shape[1:]) for matrix in matrices]
        return torch.cat(stretches, dim=1).flatten(0, 1)

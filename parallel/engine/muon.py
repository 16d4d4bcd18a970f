"""Muon (Jordan et al. 2024) for hidden matrices, which ZeRO and tensor parallelism cut up.

Momentum is kept and updated where ZeRO keeps it, in flat pieces.
An update has to see whole matrices, so the pieces of the momentum are gathered first.
Every rank orthogonalises the matrices that its own piece overlaps and keeps its part of the result.
So data-parallel ranks share the work; tensor-parallel ranks compute the same matrices each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.parameters.names import NamedParameter
from model.parameters.shards import full_shape, put, take
from parallel.engine.gradients import GradientBuffer
from parallel.optimizers import NEWTON_SCHULZ_STEPS

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of the quintic iteration: steepest at 0 while singular values end near 1
EPSILON = 1e-7
BUCKET = 1 << 26
"""Elements that tensor-parallel ranks gather at once."""


def newton_schulz(update: Tensor) -> Tensor:
    """The nearly orthogonal matrix to `update` [m, n], in its dtype (Jordan et al. 2024).

    It has the singular vectors of `update` and all singular values near 1.
    """
    a, b, c = COEFFICIENTS
    tall = update.shape[0] > update.shape[1]
    x = update.mT if tall else update
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def scale(shape: Sequence[int]) -> float:
    """Factor that gives an orthogonal matrix [m, n] the root mean square of an AdamW update.

    With it both share a learning rate (Liu et al. 2025, eq. 4).
    """
    return 0.2 * math.sqrt(max(shape))


@dataclass(frozen=True)
class _Matrix:
    named: NamedParameter
    begin: int  # in the whole flat buffer
    numel: int
    shape: tuple[int, ...]


class Orthogonalizer:
    """From this rank's flat piece of a group's update to that of the orthogonal, scaled update.

    buffer: the group's gradient; its memory takes the gathered update, nobody reads it by then.
    dtype: of the iteration.
    Call: collective over the data- and tensor-parallel groups; [n] fp32 -> [n] fp32.
    """

    def __init__(self, buffer: GradientBuffer, dtype: torch.dtype) -> None:
        self.buffer, self.dtype = buffer, dtype
        first, last = buffer.first, buffer.first + buffer.partition.numel()
        matrices = [
            _Matrix(named, begin, view.numel(), tuple(view.shape))
            for named, view, begin in zip(buffer.group.parameters, buffer.views, buffer.offsets, strict=True)
        ]
        self.matrices = sorted(
            (one for one in matrices if one.begin < last and one.begin + one.numel > first),
            key=lambda one: one.begin,
        )

    def __call__(self, update: Tensor) -> Tensor:
        topology, first = self.buffer.topology, self.buffer.first
        whole = self.buffer.flat.view(self.dtype)[: self.buffer.flat.numel()]
        if topology.layout.replicas > 1:
            dist.all_gather_into_tensor(whole, update.to(self.dtype), group=topology.replica_group)
        else:
            whole.copy_(update)
        result = torch.zeros_like(update)
        for bucket in self._buckets():
            start, stop = bucket[0].begin, bucket[-1].begin + bucket[-1].numel
            slices = self._tensor_parallel(whole[start:stop])
            for one in bucket:
                parts = [piece[one.begin - start :][: one.numel].view(one.shape) for piece in slices]
                low, high = max(one.begin, first), min(one.begin + one.numel, first + update.numel())
                result[low - first : high - first] = self._orthogonal(one, parts).reshape(-1)[
                    low - one.begin : high - one.begin
                ]
        return result

    def _buckets(self) -> Iterator[list[_Matrix]]:
        if self.matrices:
            origin = self.matrices[0].begin
            for _, bucket in itertools.groupby(self.matrices, key=lambda one: (one.begin - origin) // BUCKET):
                yield list(bucket)

    def _tensor_parallel(self, piece: Tensor) -> list[Tensor]:
        """The same stretch of the buffer on all tensor-parallel ranks.

        They cut every matrix alike, so it holds the same matrices.
        """
        topology = self.buffer.topology
        if topology.layout.tensor == 1:
            return [piece]
        gathered = piece.new_empty(topology.layout.tensor * piece.numel())
        dist.all_gather_into_tensor(gathered, piece.contiguous(), group=topology.tensor_group)
        return list(gathered.view(topology.layout.tensor, -1))

    def _orthogonal(self, one: _Matrix, parts: list[Tensor]) -> Tensor:
        """The local part of a matrix after orthogonalising the whole, [shape]."""
        shard = one.named.shard
        whole = parts[0].new_empty(full_shape(one.shape, shard))
        for index, part in enumerate(parts[: shard.count]):
            put(whole, part, type(shard)(shard.dim, index, shard.count, shard.stride))
        scaled = torch.empty_like(whole, dtype=torch.float32)
        blocks = one.named.row.blocks
        # Query, key and value, and the halves of a gated feed-forward, only lie in one tensor.
        pairs = (
            ((whole, scaled),)
            if blocks is None
            else zip(blocks.views(whole), blocks.views(scaled), strict=True)
        )
        for view, target in pairs:
            matrix = view.reshape(-1, view.shape[-1])
            target.copy_((newton_schulz(matrix).float() * scale(matrix.shape)).view(view.shape))
        return take(scaled, shard)


class Muon(torch.optim.AdamW):
    """AdamW, and Muon with Nesterov momentum for parameter groups whose `whole` is true.

    momentum: decay of Muon's running mean of gradients, its only state, kept as `exp_avg`.
    Groups with Muon hold one flat fp32 piece each.
    `orthogonalizers` has their orthogonalisers by position of the group, set before the first step.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.momentum = momentum
        self.orthogonalizers: dict[int, Orthogonalizer] = {}
        for index, group in enumerate(self.param_groups):
            group["index"] = index

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of the present groups; DeepSpeed steps them one at a time."""
        groups = self.param_groups
        for group in groups:
            if group["whole"]:
                for piece in group["params"]:
                    self._muon(group, piece)
        self.param_groups = [group for group in groups if not group["whole"]]
        if self.param_groups:
            super().step(closure)
        self.param_groups = groups

    def _muon(self, group: dict[str, Any], piece: Tensor) -> None:
        state = self.state[piece]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=piece.device)
            state["exp_avg"] = torch.zeros_like(piece)
        state["step"] += 1
        gradient = piece.grad
        assert gradient is not None, "a step without a gradient"
        mean = state["exp_avg"].lerp_(gradient, 1 - self.momentum)
        update = self.orthogonalizers[group["index"]](gradient.lerp(mean, self.momentum))
        piece.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

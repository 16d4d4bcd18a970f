"""ZeRO-3 under Megatron-core's schedule.

Parameters are cut over the data-parallel ranks; DeepSpeed's hooks gather them module by module.

DeepSpeed reduces each micro-batch's gradients into one flat fp32 buffer of partitions,
in the order of its parameter groups, which are ours.
So a group's gradient is a slice of that buffer,
and norm, clipping and everything after it are as at the other stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from parallel.engine import deepspeed_api as api
from parallel.engine.gradients import Gradient, Group, Kind, Piece
from parallel.topology import Topology

# Elements below which DeepSpeed would keep a parameter whole on every rank.
# With 0 a rank's memory is what the stage promises.
PERSISTENT = 0


def zero_config() -> dict[str, object]:
    """DeepSpeed's `zero_optimization` section."""
    return {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "stage3_param_persistence_threshold": PERSISTENT,
        # One sub-group for each of our groups.
        "sub_group_size": 2**62,
    }


class Gathering(nn.Module):
    """What the schedule calls in place of the model: DeepSpeed's engine.

    Its forward prepares its hooks for the backward that follows.
    """

    def __init__(self, engine: nn.Module, chunk: nn.Module) -> None:
        super().__init__()
        self.module = chunk
        self.engine = [engine]  # in a list, or it would become a submodule

    def forward(self, *inputs: object, **keywords: object) -> object:
        """The chunk's forward; the same arguments and result."""
        return (
            self.engine[0](*inputs, **keywords)
            if torch.is_grad_enabled()
            else self.module(*inputs, **keywords)
        )

    def set_is_first_microbatch(self) -> None:
        """Called by the schedule once a step, where FP8 casts of weights are made anew.

        Without it they would stay those of the first step.
        """
        self.module.set_is_first_microbatch()  # type: ignore[operator]


class ScatteredGradient(Gradient):
    """A group's slice of DeepSpeed's buffer of partitions.

    It has the rank's equal piece of every parameter, the last one padded with zeros.
    """

    def __init__(self, group: Group, optimizer: api.ZeroOptimizer, first: int, topology: Topology) -> None:
        self.optimizer = optimizer
        self.parts = [named.parameter.partition_numel() for named in group.parameters]  # type: ignore[attr-defined]
        super().__init__(
            group,
            api.gradient_partitions(optimizer)[first : first + sum(self.parts)],
            topology,
            sharded=True,
        )

    def pieces(self) -> Iterator[Piece]:
        offset = 0
        for named, part in zip(self.group.parameters, self.parts, strict=True):
            start = self.topology.replica_rank * part
            length = min(part, math.prod(named.shape) - start)
            if length > 0:
                yield Piece(named, offset, start, length, named.shape)
            offset += part

    def prepare(self) -> None:
        self.partition.zero_()
        # After a skipped step DeepSpeed would add to what is there.
        api.begin_accumulation(self.optimizer)

    def reduce(self) -> None:
        if self.group.kind is Kind.SEQUENCE:
            dist.all_reduce(self.partition, group=self.topology.tensor_group)


def scattered(groups: Sequence[Group], optimizer: api.ZeroOptimizer, topology: Topology) -> list[Gradient]:
    """The gradients of all groups.

    optimizer: DeepSpeed's, of stage 3; its own norm, which nobody reads, is turned off.
    """
    api.skip_norm(optimizer)
    found: list[Gradient] = []
    first = 0
    for group in groups:
        found.append(ScatteredGradient(group, optimizer, first, topology))
        first += found[-1].partition.numel()
    return found

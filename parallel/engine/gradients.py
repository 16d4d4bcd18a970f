"""Gradients of a model as a few flat fp32 buffers.

Backward accumulates in place, one collective a group reduces, and they are clipped as a whole.

DeepSpeed's own reduction calls a Python hook per parameter and micro-batch.
At a thousand layers that costs more than the arithmetic,
and under a pipeline schedule the hooks fire at the wrong times.
Here backward only adds into views; everything else happens once a step on whole buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parameters.names import NamedParameter
from model.parameters.table import WORD_EMBEDDING, Row
from parallel.factors import ONE, Factors
from parallel.optimizers import ADAM, OPTIMIZERS, OptimizerName, Update
from parallel.topology import Topology

# One fp32 sum over 5 million elements is wrong by 1e-4 on a CPU.
# So the norm would depend on the layout; blocks of this size are right to 1e-8 at no cost.
NORM_BLOCK = 1024
BLOCK = 1 << 24
"""Elements that a rank holds twice in bf16 while it exchanges partitions."""


class Kind(Enum):
    """How a parameter's gradient is shared over the model-parallel ranks.

    Decides its reduction and how often the global norm counts it.
    """

    SHARDED = "sharded"  # a slice of its own on every tensor-parallel rank
    REPLICATED = "replicated"  # equal gradients on all tensor-parallel ranks
    SEQUENCE = "sequence"  # replicated, gradients are partial sums over the sequence shards
    TIED = "tied"  # embedding of the first stage and its copy on the last


@dataclass
class Group:
    """Parameters that are decayed, reduced, counted and updated alike."""

    kind: Kind
    decay: bool
    parameters: list[NamedParameter]
    update: Update = ADAM
    """What moves them."""
    factors: Factors = ONE


def kind_of(named: NamedParameter, topology: Topology, tied: bool) -> Kind:
    """Kind of a parameter, by its attributes, never by its module's class.

    tied: embedding and output share weights.
    """
    parameter = named.parameter
    if tied and topology.layout.pipeline > 1 and named.name == WORD_EMBEDDING:
        return Kind.TIED
    if getattr(parameter, "tensor_model_parallel", False):
        return Kind.SHARDED
    if topology.layout.tensor > 1 and getattr(parameter, "sequence_parallel", False):
        return Kind.SEQUENCE
    return Kind.REPLICATED


def build_groups(
    parameters: Sequence[NamedParameter],
    topology: Topology,
    *,
    tied: bool,
    decay_embeddings: bool,
    optimizer: OptimizerName = "adamw",
    factors: Callable[[Row], Factors] = lambda row: ONE,
) -> list[Group]:
    """Groups of the local parameters, in a fixed order; only non-empty ones.

    Matrices are decayed, vectors are not.
    optimizer: whose updates they get; hidden matrices are apart where theirs is another.
    factors: of each parameter on the optimizer's settings.
    """
    groups: dict[tuple[Kind, bool, str, Factors], Group] = {}
    for named in parameters:
        matrix = named.parameter.dim() >= 2
        decay = matrix and (decay_embeddings or named.row.stack != "embedding")
        update = OPTIMIZERS[optimizer].update(hidden=named.row.hidden)
        kind, own = kind_of(named, topology, tied), factors(named.row)
        group = groups.setdefault((kind, decay, update.name, own), Group(kind, decay, [], update, own))
        group.parameters.append(named)
    return sorted(
        groups.values(), key=lambda group: (group.kind.value, group.decay, group.update.name, group.factors)
    )


class Piece(NamedTuple):
    """Elements start .. start + length of the flattened local tensor."""

    named: NamedParameter
    offset: int
    """Where they begin in a group's partition."""
    start: int
    length: int
    shape: tuple[int, ...]
    """Of the local tensor."""


class Gradient:
    """The gradient of one group: this rank's partition of it, flat in fp32.

    counted: whether the global norm counts it on this rank.
    sharded: partitions of data-parallel ranks differ.
    """

    def __init__(self, group: Group, partition: Tensor, topology: Topology, *, sharded: bool) -> None:
        self.group, self.partition, self.topology, self.sharded = group, partition, topology, sharded
        self.counted = {
            Kind.SHARDED: True,
            Kind.REPLICATED: topology.tensor_rank == 0,
            Kind.SEQUENCE: topology.tensor_rank == 0,
            Kind.TIED: topology.first_stage or topology.layout.pipeline == 1,
        }[group.kind] and (sharded or topology.replica_rank == 0)

    def pieces(self) -> Iterator[Piece]:
        """What of which parameter lies in the partition, in order."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Before the first micro-batch of a step."""
        raise NotImplementedError

    def reduce(self) -> None:
        """After the last micro-batch: what is still to be summed over ranks."""
        raise NotImplementedError

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared global norm, a scalar in fp64."""
        if not self.counted:
            return torch.zeros((), dtype=torch.float64, device=self.partition.device)
        whole = self.partition.numel() // NORM_BLOCK * NORM_BLOCK
        blocks = self.partition[:whole].view(-1, NORM_BLOCK)
        norms = torch.linalg.vector_norm(blocks, dim=1).double().square().sum()
        rest = torch.linalg.vector_norm(self.partition[whole:]).double().square()
        total: Tensor = norms + rest
        return total


class GradientBuffer(Gradient):
    """The whole flat fp32 gradient of one group, of which a partition is this rank's.

    offsets: first element of each parameter.
    numel: size with padding, a multiple of the data-parallel size where the buffer is sharded.
    Its views are the parameters' `main_grad`, and in fp32 their `.grad`.
    In lower precision a hook adds each gradient into it and drops it.
    """

    def __init__(
        self, group: Group, offsets: Sequence[int], numel: int, topology: Topology, *, sharded: bool
    ) -> None:
        first = group.parameters[0].parameter
        self.flat = torch.zeros(numel, dtype=torch.float32, device=first.device)
        self.parameters = [named.parameter for named in group.parameters]
        self.offsets = list(offsets)
        self.views = [
            self.flat[start : start + p.numel()].view_as(p)
            for p, start in zip(self.parameters, offsets, strict=True)
        ]
        size = numel // (topology.layout.replicas if sharded else 1)
        self.first = topology.replica_rank * size if sharded else 0
        super().__init__(group, self.flat[self.first : self.first + size], topology, sharded=sharded)
        self.started = numel
        self.works: list[dist.Work] = []
        self.in_bf16 = False
        """Ranks send each other bf16 for their partitions."""
        self.direct = first.dtype == torch.float32
        for parameter, view in zip(self.parameters, self.views, strict=True):
            accumulates(parameter, view)

    def pieces(self) -> Iterator[Piece]:
        last = self.first + self.partition.numel()
        for named, view, begin in zip(self.group.parameters, self.views, self.offsets, strict=True):
            low, high = max(begin, self.first), min(begin + view.numel(), last)
            if low < high:
                yield Piece(named, low - self.first, low - begin, high - low, tuple(view.shape))

    def prepare(self) -> None:
        """Before the first micro-batch of a step: zero.

        In fp32 also hands the views to backward, which adds in place.
        """
        self.flat.zero_()
        self.started = self.flat.numel()
        if self.direct:
            for parameter, view in zip(self.parameters, self.views, strict=True):
                parameter.grad = view

    def start(self, low: int) -> None:
        """Begins the mean over data-parallel ranks of what is final.

        That is from element `low` to where the last call of this step began, or the end.
        """
        part, group = self.flat[low : self.started], self.topology.replica_group
        part.div_(self.topology.layout.replicas)
        if not self.sharded:
            self.works.append(dist.all_reduce(part, group=group, async_op=True))
        else:
            size = self.partition.numel()
            for rank in range(low // size, -(-self.started // size)):
                own = self.flat[max(low, rank * size) : min(self.started, (rank + 1) * size)]
                self.works.append(dist.reduce(own, group=group, group_dst=rank, async_op=True))
        self.started = low

    def land(self) -> None:
        """Waits for what has begun."""
        for work in self.works:
            work.wait()
        self.works.clear()

    def reduce(self) -> None:
        """After the last micro-batch: what is still to be summed over ranks.

        Sums over sequence shards and tied copies, mean over data-parallel ranks
        (of the own partition where sharded).
        """
        if self.started < self.flat.numel():
            self.start(0)
            self.land()
            return
        if self.group.kind is Kind.SEQUENCE:
            dist.all_reduce(self.flat, group=self.topology.tensor_group)
        elif self.group.kind is Kind.TIED:
            dist.all_reduce(self.flat, group=self.topology.embedding_group)
        replicas = self.topology.layout.replicas
        if replicas == 1:
            return
        # Gloo has no averaging; the division is exact for powers of two and the same on every rank.
        self.flat.div_(replicas)
        if self.in_bf16:
            sum_of_bf16(self.flat, self.partition, self.topology.replica_group)
        elif self.sharded and self.flat.is_cuda:
            dist.reduce_scatter_tensor(self.partition, self.flat, group=self.topology.replica_group)
        else:
            dist.all_reduce(self.flat, group=self.topology.replica_group)


def sum_of_bf16(flat: Tensor, partition: Tensor, group: dist.ProcessGroup) -> None:
    """Puts the sum of this partition over ranks in its place. Collective.

    Each rank sends the others their partitions of its own `flat` in bf16 and adds up what it gets
    in fp32: every addend is rounded once, and no sum.
    """
    ranks = group.size()
    pieces = flat.view(ranks, -1)
    columns = max(1, BLOCK // ranks)
    for low in range(0, pieces.shape[1], columns):
        sent = pieces[:, low : low + columns].to(torch.bfloat16)
        got = torch.empty_like(sent)
        # As bytes: gloo does not know bf16.
        dist.all_to_all_single(got.view(torch.uint8), sent.view(torch.uint8), group=group)
        torch.sum(got, 0, dtype=torch.float32, out=partition[low : low + columns])


def accumulates(parameter: nn.Parameter, total: Tensor) -> None:
    """From now on backward passes add the parameter's gradient to `total`, fp32 and of its shape.

    In fp32 until somebody sets `.grad` to something else.
    Products that add a weight's gradient themselves (`model/layers/products.py`) find it as
    `main_grad`.
    """
    parameter.main_grad = total  # type: ignore[attr-defined]
    if parameter.dtype == torch.float32:
        parameter.grad = total
        return
    parameter.register_post_accumulate_grad_hook(_accumulate)  # type: ignore[no-untyped-call]


def _accumulate(parameter: nn.Parameter) -> None:
    # There is none where the product has added it.
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None

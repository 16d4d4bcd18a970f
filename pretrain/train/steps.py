"""From a task to Megatron-core's forward steps, which the engine runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model.layers.context import own_pieces
from parallel.engine.engine import ForwardStep
from parallel.topology import Topology
from pretrain.tasks.task import Batch, Task


def shared(batches: list[Batch], labels: int | None, replicas: int) -> list[Batch]:
    """A rank's micro-batches of a step with what they weigh in its loss.

    labels: of the whole step that count; None where all do. replicas: as `Layout.replicas`.
    """
    if labels is None:
        return batches
    share = torch.tensor(len(batches) * replicas / max(labels, 1))
    return [batch | {"share": share} for batch in batches]


def training_step(task: Task) -> ForwardStep:
    """From a micro-batch to the output of a chunk, and the function that makes it the loss."""

    def step(iterator: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)

        def loss_of(losses_bt: Tensor) -> tuple[Tensor, Tensor]:
            loss = task.loss(losses_bt, batch)
            return loss, loss.detach().clone()

        return chunk(batch), loss_of

    return step


WHOLE = ("documents",)
"""What every rank reads of whole sequences: keys are all there (`model/layers/context.py`)."""


def own_tokens(batch: Batch, topology: Topology) -> Batch:
    """What a rank gets of a micro-batch whose sequences are cut over context-parallel ranks."""
    rank, ranks = topology.context_rank, topology.layout.context
    if ranks == 1:
        return batch
    return {
        name: own_pieces(tensor, 1, rank, ranks) if tensor.dim() > 1 and name not in WHOLE else tensor
        for name, tensor in batch.items()
    }


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def evaluation_step(task: Task) -> ForwardStep:
    """As `training_step`, to what the task counts in an evaluation."""

    def step(iterator: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)

        def counts_of(measured: Tensor) -> tuple[Tensor, Tensor]:
            found = task.counts(measured, batch)
            return found[0].clone(), found  # the schedule divides the first in place

        return chunk(batch, hits=task.accuracy, within=task.within), counts_of

    return step

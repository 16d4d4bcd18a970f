"""What a training task says: its samples, its loss and what it counts.

Data, and functions of tensors. Which families can learn a task follows from what it needs of a
stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.families.family import Family, Mask

if TYPE_CHECKING:  # a configuration is read without PyTorch
    from torch import Tensor

Batch = dict[str, "Tensor"]
"""Named tensors of a micro-batch, of shapes that are the same in every step.

The model reads those that `model/network/language_model.py` names. Where not all labels count, the
loss reads these:
weights: [b, t] in fp32, 1 for a label that counts, 0 for one that does not;
share: a scalar in fp32, micro-batches of a step x data-parallel ranks / labels of the whole step
that count.
"""

SampleKind = Literal["next_token", "masked", "pairs"]
"""A kind of samples, of which `pretrain/data/samples.py` makes batches."""


def mean_loss(losses_bt: Tensor, batch: Batch) -> Tensor:
    """This micro-batch's part of the loss of a step, in nats, a scalar in fp32.

    The mean of these parts over micro-batches and data-parallel ranks is the mean over all labels
    of the step that count, wherever they are.
    """
    losses = losses_bt.float()
    weights = batch.get("weights")
    if weights is None:
        return losses.mean()
    return (losses * weights).sum() * batch["share"]


def loss_sums(losses_bt: Tensor, batch: Batch) -> Tensor:
    """(sum of the losses in nats, number) of the labels that count, [2] in fp64."""
    losses = losses_bt.double()
    weights = batch.get("weights", losses.new_ones(losses.shape))
    found = losses.new_zeros(2)
    found[0], found[1] = (losses * weights).sum(), weights.sum()
    return found


@dataclass(frozen=True)
class Task:
    """One kind of training."""

    name: str
    """What `train.task` calls it."""
    summary: str
    """In one line."""
    mask: Mask
    """What a token attends to in the stack that makes the predictions."""
    samples: SampleKind
    """What its batches are made of."""
    crossed: bool = False
    """It is for a decoder over an encoder, which reads a source."""
    sections: tuple[str, ...] = ()
    """Sections of a configuration that only some tasks read, and this one does."""
    loss: Callable[[Tensor, Batch], Tensor] = mean_loss
    """From losses of labels [b, t] to this micro-batch's part of the loss of a step."""
    counts: Callable[[Tensor, Batch], Tensor] = loss_sums
    """From losses of labels [b, t] to what an evaluation sums up, [2] in fp64."""

    def suits(self, family: Family) -> bool:
        """Whether models of a family can learn it."""
        return family.crossed == self.crossed and family.stacks[-1].mask is self.mask

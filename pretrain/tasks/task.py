"""What a training task says: its samples, its loss and what it counts.

Data, and functions of tensors. Which families can learn a task follows from what it needs of a
stack.
"""

from __future__ import annotations

import math
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

SampleKind = Literal["next_token", "masked", "pairs", "spans", "images", "clips"]
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


def label_sums(measured: Tensor, batch: Batch) -> Tensor:
    """Sums over the labels that count of each of k measures, and their number: [k + 1] in fp64.

    measured: [k, b, t], or [b, t] of one.
    """
    measured_kbt = measured.double().reshape(-1, *batch["labels"].shape)
    weights_bt = batch.get("weights", measured_kbt.new_ones(measured_kbt.shape[1:]))
    found = measured_kbt.new_zeros(len(measured_kbt) + 1)
    found[:-1] = (measured_kbt * weights_bt).sum((1, 2))
    found[-1] = weights_bt.sum()
    return found


def perplexity(loss: float) -> float | None:
    """exp(loss); None beyond the range of floating-point numbers."""
    return math.exp(loss) if loss < 700 else None


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
    unit: str = "windows of data.seq_length={}"
    """What its samples are, in words; {} stands for the sequence length."""
    counted: str = "token"
    """What labels are counted in: losses are in nats per one of them, speeds in many a second."""
    inputs: Literal["tokens", "patches", "frames"] = "tokens"
    """What its models read."""
    crossed: bool = False
    """It is for a decoder over an encoder, which reads a source."""
    sections: tuple[str, ...] = ()
    """Sections of a configuration that only some tasks read, and this one does."""
    loss: Callable[[Tensor, Batch], Tensor] = mean_loss
    """From losses of labels [b, t] to this micro-batch's part of the loss of a step."""
    accuracy: bool = False
    """Whether an evaluation also tells how many labels are the model's likeliest token."""
    within: int | None = None
    """Beside accuracy, how many labels are among so many likeliest ones."""
    counts: Callable[[Tensor, Batch], Tensor] = label_sums
    """From losses of labels [b, t], or losses and hits [2 or 3, b, t], to what an evaluation sums
    up: these sums and the number of labels, `sums` values in fp64.
    """

    @property
    def of_text(self) -> bool:
        """Whether its labels are tokens of a text, of which exp(loss) is a perplexity."""
        return self.counted == "token"

    @property
    def sums(self) -> int:
        """How many sums an evaluation makes."""
        return 2 + self.accuracy + (self.within is not None)

    def suits(self, family: Family) -> bool:
        """Whether models of a family can learn it."""
        same = family.crossed == self.crossed and family.inputs == self.inputs
        return same and family.stacks[-1].mask is self.mask

"""Whether the first optimizer step moved the weights, which names and signatures cannot show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 4096
"""Elements of a group that are looked at."""
STEPS = 8.0
"""A weight is looked at where the learning rate is so many times what fp32 can tell apart there."""


@dataclass(frozen=True)
class Sample:
    """Some master weights of one group before an optimizer step."""

    name: str
    """Of the group's first parameter."""
    weights: Tensor
    """fp32 master weights, [n]; the step changes them in place."""
    gradient: Tensor
    """Their gradients as the optimizer gets them, [n]."""
    rate: float
    """Learning rate of the step."""
    eps: float
    """Gradient below which Adam's step is smaller than the rate."""


@dataclass(frozen=True)
class Watched:
    """Elements that an optimizer step must not all leave as they are."""

    sample: Sample
    index: Tensor
    """Where they are, [m]."""
    before: Tensor
    """Their values, [m]."""


def watch(samples: Iterable[Sample]) -> list[Watched]:
    """What to look at after the step.

    These are elements with a gradient, which a step of the rate's size changes.
    """
    found = []
    for sample in samples:
        weights, gradient = sample.weights[:SAMPLE], sample.gradient[:SAMPLE].to(sample.weights.device)
        visible = weights.abs() * (STEPS * torch.finfo(torch.float32).eps) < sample.rate
        pushed = (gradient != 0) & (gradient.abs() >= sample.eps)
        index = torch.nonzero(visible & pushed).flatten()
        if index.numel():
            found.append(Watched(sample, index, weights[index].clone()))
    return found


def check_moved(watched: Iterable[Watched]) -> None:
    """Call after the step.

    Raises RuntimeError, naming a parameter, where a group's weights did not move.
    """
    for one in watched:
        if torch.equal(one.sample.weights[one.index], one.before):
            raise RuntimeError(
                f"the first optimizer step left {len(one.before)} master weights of {one.sample.name} and "
                "of others where they were, although they have gradients: the installed DeepSpeed does not "
                "take the gradients that it is given (parallel/engine/deepspeed_api.py)"
            )

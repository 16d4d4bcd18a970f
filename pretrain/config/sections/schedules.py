"""Shapes of the learning rate after its warm-up: one table.

A new shape is one entry here; configuration and loop read the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a step is in a run."""

    step: int
    """Counted from 1; above `warmup`."""
    total: int
    """Steps of the run."""
    warmup: int
    """Steps of the warm-up."""
    decay: int
    """Steps of the final decay, for shapes that have one."""

    @property
    def done(self) -> float:
        """Share of what follows the warm-up, 0 to 1."""
        return min(1.0, (self.step - self.warmup) / max(1, self.total - self.warmup))


@dataclass(frozen=True)
class Shape:
    """How the rate falls from its peak to its floor."""

    height: Callable[[Place], float]
    """Where the rate is between floor (0) and peak (1)."""
    has_floor: bool = True
    """`schedule.min_lr_ratio` is read."""
    has_decay: bool = False
    """`schedule.decay_steps` is read."""


def _decay(place: Place) -> float:
    return min(1.0, max(0.0, (place.total - place.step) / place.decay))


SCHEDULES: dict[str, Shape] = {
    "cosine": Shape(lambda place: 0.5 * (1 + math.cos(math.pi * place.done))),
    "linear": Shape(lambda place: 1 - place.done),
    "wsd": Shape(_decay, has_decay=True),
    "inverse_sqrt": Shape(lambda place: math.sqrt(max(place.warmup, 1) / place.step), has_floor=False),
    "constant": Shape(lambda place: 1.0, has_floor=False),
}

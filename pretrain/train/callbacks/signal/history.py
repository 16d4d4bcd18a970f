"""When a measured value departs from its own history.

A robust test on logarithms, for positive signals that vary by factors.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

MEMORY = 32
"""Measurements a value is compared with, at most."""
ENOUGH = 8
"""Fewer than this are no history."""
FACTOR = 3.0
"""A departure is at least this many times the median, or one over it."""
SPREADS = 6.0
"""And at least this many robust standard deviations away, of the logarithm."""
FLOOR = 0.02
"""Smallest standard deviation assumed.

A value that has not moved at all may still move by some percent.
"""
JUMP = 2.0
"""And it is at least this factor away from each of the last three measurements.

Early training moves fast, but not at once.
"""


@dataclass(frozen=True)
class Departure:
    """A value of one layer that left its history."""

    layer: int
    key: str
    value: float
    factor: float
    """Over the median of the last `count` measurements."""
    z: float
    """Robust z-score of the logarithm."""
    count: int

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"layer {self.layer}: {self.key} is not finite"
        return (
            f"layer {self.layer}: {self.key} {self.value:.3g} is {self.factor:.2g} "
            f"times the median of its last {self.count} measurements (z = {self.z:.0f})"
        )


class History:
    """The last measurements of every (layer, key), and which of them have just been reported."""

    def __init__(self) -> None:
        self._past: dict[tuple[int, str], deque[float]] = {}
        self._silent: dict[tuple[int, str], int] = {}

    def check(self, layer: int, key: str, value: float) -> Departure | None:
        """Adds a measurement; returns it where it departs from the ones before.

        A layer's value that was reported is silent for the next `ENOUGH`.
        Values that depart are kept too, so that a new level becomes the history.
        Zeros (a frozen layer, a first step at rate 0) are passed over.
        """
        place = (layer, key)
        if value == 0:
            return None
        past = self._past.setdefault(place, deque(maxlen=MEMORY))
        departed = self._departure(layer, key, value, past)
        if math.isfinite(value) and value > 0:
            past.append(math.log(value))
        if self._silent.get(place, 0):
            self._silent[place] -= 1
            return None
        if departed is not None:
            self._silent[place] = ENOUGH
        return departed

    def _departure(self, layer: int, key: str, value: float, past: deque[float]) -> Departure | None:
        if not math.isfinite(value):
            return Departure(layer, key, value, math.nan, math.inf, len(past))
        if len(past) < ENOUGH or value < 0:
            return None
        middle = median(past)
        # 1.4826 makes the median absolute deviation the standard deviation of normal values.
        spread = max(FLOOR, 1.4826 * median([abs(one - middle) for one in past]))
        distance = math.log(value) - middle
        jump = min(abs(math.log(value) - one) for one in list(past)[-3:])
        if abs(distance) < math.log(FACTOR) or abs(distance) < SPREADS * spread or jump < math.log(JUMP):
            return None
        return Departure(layer, key, value, math.exp(distance), distance / spread, len(past))


def message(departures: list[Departure], layers: int) -> str:
    """One line for what departed at one step under one key.

    It names the worst layer, and tells how many others departed.
    """
    worst = max(departures, key=lambda departure: (not math.isfinite(departure.value), abs(departure.z)))
    others = len(departures) - 1
    if not others:
        return str(worst)
    where = f"{others} of the other {layers - 1} layers" if layers > 2 else "the other layer"
    return f"{worst}; also in {where}"

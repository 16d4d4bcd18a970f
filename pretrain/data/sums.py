"""Mean and spread of what a data set holds, added up while it is written."""

from __future__ import annotations

import numpy as np


class Sums:
    """Sums of values and of their squares, of several features each."""

    def __init__(self, features: int) -> None:
        self.sums, self.squares = np.zeros(features), np.zeros(features)
        self.count = 0
        """Values of each feature."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each feature."""
        return tuple(map(float, self.sums / self.count))

    @property
    def std(self) -> tuple[float, ...]:
        """Of each feature."""
        variance = self.squares / self.count - (self.sums / self.count) ** 2
        return tuple(map(float, np.sqrt(variance.clip(0))))

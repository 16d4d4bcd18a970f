"""What parameters multiply the optimizer's settings by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Factors:
    """Factors of some parameters.

    Checkpoints hold no rates, so that the factors of the configuration in force always count.
    """

    rate: float = 1.0
    """On the learning rate."""
    eps: float = 1.0
    """On Adam's epsilon."""
    decay: float = 1.0
    """On the weight decay. A step decays by its rate times this."""

    def times(self, other: Factors) -> Factors:
        """Both together."""
        return Factors(self.rate * other.rate, self.eps * other.eps, self.decay * other.decay)


ONE = Factors()

"""Steps that would harm: a loss or a gradient norm far above those of the steps before.

The engine has both numbers on the host before it applies a step, the same on all ranks, from the
one exchange that every step has anyway: a decision by them costs nothing more.
The threshold is a median plus a multiple of the median distance from it, so that spikes in the
window hardly move it. A new level that stays is accepted before it fills half of the window, unless
`limit` steps in a row were left out before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from pretrain.config.sections.spikes import SpikeConfig

NORMAL = 1.4826
"""Standard deviation of normal values over the median of their distances from their median."""
LEAST = 1e-3
"""Smallest spread over the median: values that hardly change would make noise a spike."""


class SpikeGuard:
    """Decides about steps, in their order."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.recent: deque[tuple[float, float]] = deque(maxlen=config.window)
        """(loss, gradient norm) of the last steps that were finite, applied or not."""
        self.reason = ""
        """Why the last step was left out; empty where it was not a spike."""

    @property
    def active(self) -> bool:
        """Whether any step may be left out."""
        return self.config.sigma is not None

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether a step is to be applied. Both numbers are finite."""
        self.reason = ""
        if not self.active:
            return True
        if len(self.recent) >= self.config.window // 2:
            for name, value, before in zip(
                ("loss", "gradient norm"), (loss, norm), zip(*self.recent, strict=True), strict=True
            ):
                if value > (highest := self._highest(before)):
                    self.reason = (
                        f"{name} {value:.4g} is above {highest:.4g}, which is {self.config.sigma:g} times "
                        f"the spread over the median of {len(before)} steps; the step was not applied"
                    )
                    break
        self.recent.append((loss, norm))
        return not self.reason

    def _highest(self, before: Iterable[float]) -> float:
        assert self.config.sigma is not None
        values = list(before)
        middle = median(values)
        spread = NORMAL * median(abs(value - middle) for value in values)
        return middle + self.config.sigma * max(spread, LEAST * abs(middle))

    def state(self) -> dict[str, list[tuple[float, float]]]:
        """What a checkpoint keeps of it."""
        return {"recent_steps": list(self.recent)} if self.active else {}

    def restore(self, recent: Iterable[tuple[float, float]] | None) -> None:
        """Goes on from what a checkpoint kept."""
        if self.active:
            self.recent.extend(recent or ())

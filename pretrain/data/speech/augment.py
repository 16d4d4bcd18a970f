"""What is hidden of a clip: a function of seed, number of the sample and settings."""

from __future__ import annotations

import numpy as np

from pretrain.config.sections.spec_augment import SpecAugment
from pretrain.data.images.augment import Draws


def hide(frames: np.ndarray, settings: SpecAugment, draws: Draws) -> None:
    """Sets what is hidden of standardised frames [f, m] to 0, the mean of every filter."""
    count, filters = frames.shape
    for _ in range(settings.frequency_masks):
        width = draws.below(min(settings.frequency_width, filters) + 1)
        first = draws.below(filters - width + 1)
        frames[:, first : first + width] = 0.0
    longest = min(settings.time_width, int(settings.time_share * count))
    for _ in range(settings.time_masks):
        width = draws.below(longest + 1)
        first = draws.below(count - width + 1)
        frames[first : first + width] = 0.0

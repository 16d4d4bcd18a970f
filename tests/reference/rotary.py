"""Scaled rotary frequencies, entry by entry, from their published equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear(base: float, width: int, factor: float) -> Tensor:
    """Chen et al. 2023: positions divided by the factor."""
    return torch.tensor([base ** (-2 * i / width) / factor for i in range(width // 2)], dtype=torch.float64)


def llama3(base: float, width: int, factor: float, original: int, low: float, high: float) -> Tensor:
    """Llama 3.1, by wavelengths as in its code."""
    found = []
    for i in range(width // 2):
        frequency = base ** (-2 * i / width)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            found.append(frequency)
        elif wavelength > original / low:
            found.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.tensor(found, dtype=torch.float64)


def yarn(
    base: float, width: int, factor: float, original: int, betas: tuple[float, float], *, whole: bool
) -> Tensor:
    """Peng et al. 2023, section 3.2; whole: with limits at whole entries, as in its code."""

    def limit(turns: float) -> float:
        # The i at which original x base^(-2 i / width) = 2 pi turns.
        return width / 2 * math.log(original / (2 * math.pi * turns), base)

    first, last = limit(betas[0]), limit(betas[1])
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    found = []
    for i in range(width // 2):
        frequency = base ** (-2 * i / width)
        interpolated = min(max((i - first) / (last - first), 0.0), 1.0)
        found.append(interpolated * frequency / factor + (1 - interpolated) * frequency)
    return torch.tensor(found, dtype=torch.float64)

"""Log-mel filterbanks of recordings, as Kaldi computes them, and how they are stored.

A frame is 25 ms of sound at 16 kHz, the next one begins 10 ms later. Of each: the mean is taken
away, x_i - 0.97 x_(i-1), a window, the power of 257 frequencies, sums under triangles that are
evenly spread over the mel scale between 20 Hz and 8 kHz, and their logarithm (Povey et al. 2011;
the same numbers as `Speech2TextFeatureExtractor` of transformers).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.float64]
RATE = 16_000
"""Samples of a second of sound."""
WINDOW, HOP, TRANSFORM = 400, 160, 512
"""Samples of a frame, between the begins of two, and of the Fourier transform."""
FRAMES_PER_SECOND = RATE / HOP
LOWEST_HERTZ, EMPHASIS = 20.0, 0.97
LEAST_POWER = float(np.finfo(np.float32).eps)
FULL_SCALE = 2.0**15
"""Samples in -1 .. 1 are multiplied by it, so that they are those of 16 bits."""
CHUNK = 4096
"""Frames computed together."""
STEP, OFFSET = 1 / 512, 64.0
"""Values are stored as whole numbers of steps above -OFFSET, in 16 bits."""
LEAST_STD = 1e-3
"""By which a filter that hears nothing is divided."""


def seconds_of(frames: int) -> float:
    """How long a recording of so many frames may be."""
    return (frames * HOP + WINDOW - 1) / RATE


def _mel(hertz: float | Array) -> Array:
    return np.asarray(1127.0 * np.log1p(np.asarray(hertz) / 700.0))


@lru_cache(maxsize=8)
def mel_filters(count: int) -> Array:
    """[257, count]: triangles on the mel scale, from the left to the right neighbour's peak."""
    peaks = np.linspace(_mel(LOWEST_HERTZ), _mel(RATE / 2), count + 2)
    place = _mel(np.arange(TRANSFORM // 2 + 1) * RATE / TRANSFORM)[:, None]
    rising = (place - peaks[:-2]) / (peaks[1:-1] - peaks[:-2])
    falling = (peaks[2:] - place) / (peaks[2:] - peaks[1:-1])
    return np.asarray(np.maximum(0.0, np.minimum(rising, falling)))


@lru_cache(maxsize=1)
def _window() -> Array:
    return np.asarray(np.hanning(WINDOW) ** 0.85)


def log_mel(samples: NDArray[np.floating], count: int) -> NDArray[np.float32]:
    """[frames, count] of samples in -1 .. 1 at 16 kHz. count: filters.

    Raises ValueError for fewer samples than a frame has.
    """
    if len(samples) < WINDOW:
        raise ValueError(f"{len(samples)} samples, a frame has {WINDOW}")
    framed = sliding_window_view(samples.astype(np.float64) * FULL_SCALE, WINDOW)[::HOP]
    found = np.empty((len(framed), count), dtype=np.float32)
    for first in range(0, len(framed), CHUNK):
        cut = framed[first : first + CHUNK]
        cut = cut - cut.mean(1, keepdims=True)
        before = np.concatenate((cut[:, :1], cut[:, :-1]), axis=1)
        spectrum = np.fft.rfft((cut - EMPHASIS * before) * _window(), TRANSFORM)
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        found[first : first + CHUNK] = np.log(np.maximum(power @ mel_filters(count), LEAST_POWER))
    return found


def stored(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Values as they are written to a file: within half a step, 0.001, of themselves."""
    steps = np.rint((values.astype(np.float64) + OFFSET) / STEP)
    return np.asarray(np.clip(steps, 0, np.iinfo(np.uint16).max), dtype=np.uint16)


def loaded(steps: NDArray[np.uint16]) -> NDArray[np.float32]:
    """What `stored` was given."""
    return np.asarray(steps * np.float32(STEP) - np.float32(OFFSET), dtype=np.float32)


class Scale:
    """Gives frames mean 0 and variance 1."""

    def __init__(self, normalise: str, mean: Sequence[float], std: Sequence[float]) -> None:
        """normalise: utterance, by the frames themselves; global, by these of each filter."""
        self.own = normalise == "utterance"
        self.mean = np.array(mean, dtype=np.float32)
        self.std = np.maximum(np.array(std, dtype=np.float32), LEAST_STD)

    def __call__(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """[frames, filters], a new array."""
        return own_scale(frames) if self.own else np.asarray((frames - self.mean) / self.std)


def own_scale(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """[frames, filters] with mean 0 and variance 1 over the frames of each filter."""
    mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    return np.asarray((values - mean) / np.maximum(std, LEAST_STD), dtype=np.float32)

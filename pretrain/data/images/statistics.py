"""What a model has to know of images: mean and variance of pixels, correlation of patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.data.sums import Sums

MEASURED = 256
"""Images of which correlations are measured, spread over the training split."""
LARGEST_PATCH = 64
SMALLEST_STD = 1e-3
"""Of pixels in 0 .. 1, by which those of a blank channel are divided."""


class PixelSums(Sums):
    """Of pixels in 0 .. 1 by channel, from batches of encoded images."""

    def add(self, pixels: np.ndarray) -> None:
        """pixels: [n, c, h, w] uint8."""
        channels = pixels.transpose(1, 0, 2, 3).reshape(len(self.sums), -1)
        counts = np.stack([np.bincount(channel, minlength=256) for channel in channels]).astype(np.float64)
        levels = np.arange(256) / 255
        self.sums += counts @ levels
        self.squares += counts @ levels**2
        self.count += channels.shape[1]

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel."""
        return tuple(max(value, SMALLEST_STD) for value in super().std)


def patch_correlations(images: np.ndarray) -> dict[int, float]:
    """Correlation of two different patches of an image, by the size of patches, clamped at 0.

    images: [n, c, h, w], standardised. Of patches p_i that is the mean of p_i . p_j over that of
    p_i . p_i. Sizes that leave fewer than two patches are left out.
    """
    found = {}
    for size in range(1, min(LARGEST_PATCH, max(images.shape[2:])) + 1):
        rows, columns = images.shape[2] // size, images.shape[3] // size
        count = rows * columns
        if count < 2:
            continue
        cut = images[:, :, : rows * size, : columns * size]
        patches = cut.reshape(*cut.shape[:2], rows, size, columns, size)
        together = np.square(patches.sum((2, 4))).sum()
        own = np.square(patches).sum()
        if own:
            found[size] = float(np.clip((together - own) / (count - 1) / own, 0.0, 0.999))
    return found


def read_some(path: Path, documents: int, shape: tuple[int, int, int], label: int) -> np.ndarray:
    """Some images of a .bin file, [n, c, h, w] uint8. label: bytes before the pixels of each."""
    stored = np.memmap(path, mode="r", dtype=np.uint8).reshape(documents, -1)
    places = np.linspace(0, documents - 1, min(documents, MEASURED)).astype(int)
    return np.asarray(stored[np.unique(places), label:]).reshape(-1, *shape)

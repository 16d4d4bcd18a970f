"""What an augmentation does to image number i: a pure function of seed, number and settings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.sections.augment import Augment
from pretrain.data.order import sample_key

TRIES = 10
"""Of a part of an image whose sides have to fit."""


class Draws:
    """Numbers in [0, 1) that belong to one sample."""

    def __init__(self, seed: int, index: int) -> None:
        # Raw output: numpy promises never to change it.
        self.generator = np.random.Philox(key=sample_key("augment", seed, index))

    def next(self) -> float:
        """The next one."""
        return int(self.generator.random_raw()) / 2.0**64

    def below(self, count: int) -> int:
        """A whole number in 0 .. count - 1."""
        return min(int(self.next() * count), count - 1)

    def share(self, alpha: float) -> float:
        """A number drawn from Beta(alpha, alpha), alpha in (0, 1] (Joehnk 1964)."""
        while True:
            x, y = (self.next() ** (1 / alpha) for _ in range(2))
            if 0 < x + y <= 1:
                return x / (x + y)


@dataclass(frozen=True)
class View:
    """Turns prepared images [c, H, W] uint8 into what the model sees, [c, h, w] in fp32."""

    size: tuple[int, int]
    """Rows and columns that the model sees."""
    mean: Tensor
    """[c, 1, 1], of pixels in 0 .. 1."""
    std: Tensor
    """[c, 1, 1]."""

    def plain(self, pixels: Tensor) -> Tensor:
        """The middle of an image."""
        top, left = ((have - want) // 2 for have, want in zip(pixels.shape[1:], self.size, strict=True))
        return self._scaled(self._cut(pixels, top, left, self.size).float())

    def changed(self, pixels: Tensor, augment: Augment, draws: Draws) -> Tensor:
        """An image as training sees it."""
        if augment.min_area < 1:
            seen = self._scaled(self._part(pixels, augment.min_area, draws))
        else:
            border = augment.shift
            # Zero is the mean.
            padded = F.pad(self._scaled(pixels.float()), (border,) * 4)
            top, left = (
                draws.below(have - want + 1) for have, want in zip(padded.shape[1:], self.size, strict=True)
            )
            seen = self._cut(padded, top, left, self.size)
        return seen.flip(2) if augment.flip and draws.next() < 0.5 else seen

    def _part(self, pixels: Tensor, least: float, draws: Draws) -> Tensor:
        """A part of an image, scaled to what the model sees (as in Szegedy et al. 2015)."""
        height, width = pixels.shape[1:]
        for _ in range(TRIES):
            area = height * width * (least + (1 - least) * draws.next())
            ratio = (4 / 3) ** (2 * draws.next() - 1)
            rows, columns = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if 0 < rows <= height and 0 < columns <= width:
                break
        else:
            rows, columns = height, width
        top, left = draws.below(height - rows + 1), draws.below(width - columns + 1)
        part = self._cut(pixels, top, left, (rows, columns)).float()
        scaled = F.interpolate(part[None], self.size, mode="bilinear", antialias=True, align_corners=False)
        return scaled[0]

    @staticmethod
    def _cut(image: Tensor, top: int, left: int, size: tuple[int, int]) -> Tensor:
        return image[:, top : top + size[0], left : left + size[1]]

    def _scaled(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - self.mean) / self.std


def mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Share of the first and the rest of the second image (Zhang et al. 2018)."""
    return torch.lerp(second, first, share)

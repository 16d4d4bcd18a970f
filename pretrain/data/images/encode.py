"""What a worker of `fathom data prepare --images` does: files in, pixels with a label out.

Must stay free of torch and Megatron.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pretrain.data.images.reading import Picture
from pretrain.data.manifest import SPLITS
from pretrain.data.reading.raw_record import Broken, Record
from pretrain.data.tokens.encode import EncodedBatch, gathered, split_of

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's, by the number of channels."""
LABEL = struct.Struct("<I")
"""What stands before the pixels of an image."""
DEEP = ("I", "F")
"""What the names of Pillow's modes with more than eight bits begin with."""


@dataclass(frozen=True)
class ImageJob:
    """What every worker needs to know."""

    shape: tuple[int, int, int]
    """Channels, rows and columns that are stored."""
    split: tuple[float, float, float]
    """Shares of train, validation and test, adding up to 1."""
    named: frozenset[int]
    """Splits that the input names; what it calls train also gives those that it does not."""
    seed: int

    def encoder(self) -> ImageEncoder:
        """As `Job`."""
        return ImageEncoder(self)


class ImageEncoder:
    """Turns batches of images into pixels. One for each process."""

    def __init__(self, job: ImageJob) -> None:
        self.job = job
        kept = [0.0 if own in job.named and own else share for own, share in enumerate(job.split)]
        first, second, third = (share / sum(kept) for share in kept)
        self.shares = first, second, third

    def encode(self, batch: list[Record], size: int) -> EncodedBatch:
        """Encodes the images of a batch; order is kept within each split."""
        result = EncodedBatch(records=len(batch), size=size)
        documents, sizes, splits = [], [], []
        for record in batch:
            if isinstance(record.raw, Broken):
                result.broken.append(record.raw)
                continue
            assert isinstance(record.raw, Picture)
            try:
                content = record.raw.content
                data = content.read_bytes() if isinstance(content, Path) else content
                pixels = self._pixels(data)
            except Exception as error:  # decoders raise whatever a damaged file leads them to
                reason = f"{type(error).__name__}: {error}".replace("\n", " ")
                if isinstance(error, UnidentifiedImageError):  # which names an address in memory
                    reason = "no image of a known kind"
                result.broken.append(Broken(record.file, record.line, reason))
                continue
            documents.append(LABEL.pack(record.raw.label) + pixels)
            sizes.append(len(data))
            given = record.raw.split
            splits.append(given or split_of(pixels, self.job.seed, self.shares))
        result.splits = tuple(
            gathered(documents, sizes, 1, [own == split for own in splits]) for split in range(len(SPLITS))
        )
        return result

    def _pixels(self, data: bytes) -> bytes:
        """[c, h, w] of an image, scaled to cover the shape, its middle. Raises for damaged ones."""
        channels, height, width = self.job.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd headers
            with Image.open(io.BytesIO(data)) as opened:
                if opened.mode.startswith(DEEP):
                    raise ValueError(f"pixels of more than 8 bits (mode {opened.mode})")
                image = ImageOps.exif_transpose(opened).convert(MODES[channels])
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        return np.asarray(fitted).reshape(height, width, channels).transpose(2, 0, 1).tobytes()

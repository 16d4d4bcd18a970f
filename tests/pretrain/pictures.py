"""Small images in folders, and data sets of them."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.data.images.prepare import ImageOptions, prepare_images


def write_pictures(folder: Path, classes: dict[str, int]) -> None:
    """So many images of 3 x 9 x 9 pixels a class, which differ in brightness."""
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        draw = np.random.default_rng(zlib.crc32(f"{folder.name}/{name}".encode()))
        for index in range(count):
            pixels = draw.normal(60 + 130 * number, 30, (9, 9, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def picture_data(folder: Path) -> Path:
    """A data set of two classes with 3 x 8 x 8 pixels. Returns its folder."""
    write_pictures(folder / "pictures", {"dark": 40, "light": 40})
    prepare_images(
        ImageOptions(
            inputs=[str(folder / "pictures")],
            out=folder / "data",
            tokenizer=Path(),
            split=(0.8, 0.2, 0.0),
            workers=1,
            size=(8, 8),
        )
    )
    return folder / "data"

"""`fathom data prepare --images`: image files in, a data set folder with pixels out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.errors import UserError
from model.folders import whole_folder
from model.words import printable
from pretrain.data.images.encode import LABEL, MODES, ImageJob
from pretrain.data.images.reading import ImageInput, find_images
from pretrain.data.images.statistics import PixelSums, patch_correlations, read_some
from pretrain.data.manifest import FORMAT, MANIFEST, ImageFacts, Manifest, SourceFacts
from pretrain.data.prepare import (
    DATA_SET,
    CommonOptions,
    PrepareProgress,
    check_options,
    nothing,
    write_all,
)
from pretrain.data.reading.raw_record import Record
from pretrain.data.tokens.encode import EncodedBatch, EncodedSplit
from pretrain.data.writer import NAME, DatasetOutput


@dataclass(frozen=True)
class ImageOptions(CommonOptions):
    """The choices of `fathom data prepare --images`."""

    size: tuple[int, int] = (224, 224)
    """Rows and columns that are stored."""
    channels: int = 3


@dataclass(frozen=True)
class Classes:
    """What takes the place of a tokenizer: labels are numbers of these."""

    names: tuple[str, ...]
    dtype = np.uint8
    """Of what is stored."""

    @property
    def vocab_size(self) -> int:
        """How many there are."""
        return len(self.names)

    @property
    def sha256(self) -> str:
        """Of their names."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()


class ImageOutput(DatasetOutput):
    """The splits of a data set of images, and the statistics of its pixels."""

    what = "images"

    def __init__(self, folder: Path, classes: Classes, shape: tuple[int, int, int], strict: bool) -> None:
        super().__init__(folder, classes, strict)
        self.shape = shape
        self.sums = PixelSums(shape[0])

    def _occurrences(self, part: EncodedSplit) -> np.ndarray:
        stored = np.frombuffer(part.tokens, dtype=np.uint8).reshape(len(part.lengths), -1)
        if not len(stored):
            return np.zeros_like(self.counts)
        labels = np.ascontiguousarray(stored[:, : LABEL.size]).view("<u4")[:, 0]
        return np.bincount(labels, minlength=len(self.counts))

    def add(self, result: EncodedBatch) -> None:
        """As `DatasetOutput`."""
        super().add(result)
        train = result.splits[0]
        if len(train.lengths):
            stored = np.frombuffer(train.tokens, dtype=np.uint8).reshape(len(train.lengths), -1)
            self.sums.add(stored[:, LABEL.size :].reshape(-1, *self.shape))

    def facts(self, classes: Classes, documents: int) -> ImageFacts:
        """What the manifest says of images. documents: of the training split."""
        pixels = read_some(self.folder / "train.bin", documents, self.shape, LABEL.size) / np.float32(255)
        mean, std = (
            np.array(values, dtype=np.float32)[:, None, None] for values in (self.sums.mean, self.sums.std)
        )
        return ImageFacts(
            classes=classes.names,
            channels=self.shape[0],
            height=self.shape[1],
            width=self.shape[2],
            mean=self.sums.mean,
            std=self.sums.std,
            patch_correlations=patch_correlations((pixels - mean) / std),
        )


def prepare_images(
    options: ImageOptions, on_progress: Callable[[PrepareProgress], None] = nothing
) -> Manifest:
    """Writes the data set folder and returns its manifest, as `prepare` does for texts.

    Images are scaled until they cover the size, and their middle is kept. Broken ones are left out,
    counted and named. An image's split is the one that its input names, or follows from a hash of
    its pixels; where an input names train alone, or without validation, the missing ones are taken
    out of train.
    Raises UserError as `prepare` does.
    """
    split = check_options(options)
    if options.channels not in MODES:
        raise UserError(f"--channels {options.channels}: give one of {', '.join(map(str, MODES))}")
    inputs = find_images(options.inputs)
    classes = Classes(tuple(sorted({name for one in inputs for name in one.classes})))
    if classes.vocab_size < 2:
        raise UserError(f"INPUT: has the one class {classes.names}; give images of two classes at least")
    shape = (options.channels, *options.size)
    named = frozenset().union(*(one.splits for one in inputs))
    with whole_folder(options.out, DATA_SET, options.overwrite) as folder:
        output = ImageOutput(folder, classes, shape, options.strict)
        job = ImageJob(shape, split, named, options.seed)
        write_all(_records(inputs, classes), job, output, options, (None, on_progress))
        written = output.finish()
        manifest = Manifest(
            format=FORMAT,
            tokenizer_sha256=classes.sha256,
            vocab_size=classes.vocab_size,
            eod_id=0,
            seed=options.seed,
            split=options.split,
            split_by="image",
            limit=options.limit,
            sources=tuple(
                SourceFacts(input=printable(one.name, NAME), kinds=(one.kind,), parts=1) for one in inputs
            ),
            versions={
                name: importlib.metadata.version(name)
                for name in ("megatron-core", "pillow", "datasets", "numpy")
            },
            images=output.facts(classes, written["splits"]["train"].documents),
            **written,
        )
        (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    return manifest


def _records(inputs: list[ImageInput], classes: Classes) -> Iterator[tuple[Record, int]]:
    for one in inputs:
        yield from one.records(classes.names)

"""Images for training: read by position, changed as the settings say, with their labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.errors import UserError
from model.images import ImageConfig
from pretrain.config.schema import RunConfig
from pretrain.config.sections.augment import Augment
from pretrain.data.blend import Blend
from pretrain.data.images.augment import Draws, View, mixture
from pretrain.data.images.encode import LABEL
from pretrain.data.index_cache import cache_folder
from pretrain.data.indexed import IndexedDataset
from pretrain.data.manifest import fingerprint, load_manifest
from pretrain.data.passes import Passes
from pretrain.data.token_files import check_start, damaged, split_prefix
from pretrain.tasks.task import Batch


class ImageReader:
    """The images of one split of one data set, pass after pass."""

    alone = True
    """Nothing is cached for others: an order takes milliseconds."""

    def __init__(self, path: str, split: str, seed: int, cache: Path) -> None:
        self.path, self.split, self.cache = path, split, cache
        self.manifest = load_manifest(path)
        if self.manifest.images is None:
            raise UserError(
                f"data set {path} holds no images, which train.task=classification reads: "
                "prepare it with `fathom data prepare --images`"
            )
        self.facts = self.manifest.images
        prefix = split_prefix(path, split, self.manifest)
        check_start(path, split, self.manifest)
        self.fingerprint = fingerprint(self.manifest, split)
        self.samples = self.manifest.facts(path, split).documents
        if not self.samples:
            off = "" if split == "train" else ", or set train.eval_samples=0"
            raise UserError(f"data set {path}: the {split} split has no images; prepare more{off}")
        try:
            self.dataset = IndexedDataset(prefix)
        except Exception as error:  # whatever the reader meets in a file that was overwritten
            raise damaged(path, split, error) from error
        self.passes = Passes(self.samples, seed if split == "train" else None, self.fingerprint)

    def place(self, sample: int) -> int:
        """The image of sample number `sample`, counted over all passes."""
        if sample < 0:
            raise IndexError(f"sample {sample}: numbers begin at 0")
        return self.passes.locate(sample)

    def read(self, place: int) -> tuple[Tensor, int]:
        """Pixels [c, h, w] uint8 and the label of an image."""
        facts = self.facts
        try:
            stored = np.asarray(self.dataset.get(place))
            (label,) = LABEL.unpack(stored[: LABEL.size].tobytes())
            pixels = stored[LABEL.size :].reshape(facts.channels, facts.height, facts.width).copy()
        except (ValueError, IndexError) as error:
            raise damaged(self.path, self.split, error) from error
        if label >= self.manifest.vocab_size:
            raise damaged(
                self.path, self.split, f"class {label} of {self.manifest.vocab_size}, image {place}"
            )
        return torch.from_numpy(pixels), label


class ImageBlend(Blend):
    """The images of a data set."""

    seq_length = 1

    def __init__(self, reader: ImageReader) -> None:
        super().__init__([reader], [1.0])


class Images:
    """Samples of images, each with the number of its class."""

    def __init__(
        self, path: str, split: str, image: ImageConfig, seed: int, cache: Path, augment: Augment
    ) -> None:
        """augment: of the training split; others are shown as they are."""
        self.reader = ImageReader(path, split, seed, cache)
        self.blend = ImageBlend(self.reader)
        self.changes, self.augment = split == "train", augment if split == "train" else Augment()
        self.seed, self.shape = seed, image.shape
        facts = self.reader.facts
        mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
        self.view = View(image.shape[1:], mean, std)
        check_size(path, (facts.channels, facts.height, facts.width), image)

    @classmethod
    def of(cls, config: RunConfig, split: str, alone: bool = False) -> Images:
        """Those of a run."""
        data, image = config.data, config.model.image
        assert image is not None
        if len(data.corpora) > 1:
            raise UserError(
                f"data.corpora names {len(data.corpora)} data sets, train.task=classification reads one: "
                "prepare their images together"
            )
        path = data.corpora[0].path
        cache = cache_folder(data.cache, path)
        return cls(path, split, image, config.train.seed, cache, config.augment)

    @property
    def entropy(self) -> float | None:
        """As `Samples`."""
        return self.reader.manifest.unigram_entropy_nats

    def batch(self, indices: Iterable[int]) -> Batch:
        """Returns the images named, n of them: images [n, c, h, w] in fp32, standardised.

        labels [n, 1]; of mixtures labels [n, 2] and weights [n, 2] in fp32, their shares.
        Raises as `Samples`.
        """
        samples = [self._sample(int(index)) for index in indices]
        found = {
            "images": torch.stack([image for image, _, _ in samples]),
            "labels": torch.tensor([labels for _, labels, _ in samples]),
        }
        if self.augment.mixup:
            found["weights"] = torch.tensor([shares for _, _, shares in samples])
        return found

    def _sample(self, index: int) -> tuple[Tensor, list[int], list[float]]:
        pixels, label = self.reader.read(self.reader.place(index))
        if not self.changes:
            return self.view.plain(pixels), [label], [1.0]
        draws = Draws(self.seed, index)
        image = self.view.changed(pixels, self.augment, draws)
        if not self.augment.mixup:
            return image, [label], [1.0]
        share = draws.share(self.augment.mixup)
        others, other = self.reader.read(draws.below(self.reader.samples))
        second = self.view.changed(others, self.augment, draws)
        return mixture(image, second, share), [label, other], [share, 1 - share]

    def blank(self, count: int) -> Batch:
        """As `Samples`."""
        labels = 2 if self.augment.mixup else 1
        found = {
            "images": torch.zeros(count, *self.shape),
            "labels": torch.zeros(count, labels, dtype=torch.int64),
        }
        return found | ({"weights": torch.full((count, 2), 0.5)} if labels == 2 else {})

    def targets(self, indices: Iterable[int]) -> int | None:
        """As `Samples`: the labels of a mixture count as one."""
        return len(list(indices)) if self.augment.mixup else None


def check_size(path: str, stored: tuple[int, int, int], image: ImageConfig) -> None:
    """Raises UserError where a model cannot see images of the stored size."""
    found, wanted = ("x".join(map(str, size)) for size in (stored, image.shape))
    if stored[0] != image.channels:
        raise UserError(
            f"data set {path}: its images have {stored[0]} channels, model.image.channels={image.channels}: "
            "change it, or prepare them with --channels"
        )
    if stored[1] < image.height or stored[2] < image.columns:
        raise UserError(
            f"data set {path}: its images of {found} are smaller than model.image, {wanted}: "
            "prepare larger ones with --images, or make that smaller"
        )

"""How well the model of a checkpoint tells the classes of images, on those of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from model.words import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pretrain.data.images.samples import Images
    from pretrain.trained.open import Trained

BATCH = 32
WITHIN = 5
"""Likeliest classes that `top5` looks among."""


@dataclass(frozen=True, kw_only=True)
class Classified:
    """Losses of images, summed, and how many were told right."""

    checkpoint: str
    step: int
    data: str
    images: int
    precision: str
    nats: float
    classes: dict[str, dict[str, int]]
    """Of each class that occurs: its images, and those that were taken for it (`right`)."""
    among_five: int
    """Images whose class is one of the five likeliest."""

    @property
    def right(self) -> int:
        """Images whose class is the likeliest."""
        return sum(one["right"] for one in self.classes.values())

    def to_json(self) -> dict[str, object]:
        """All of it as plain data."""
        facts: dict[str, object] = {
            name: value for name, value in vars(self).items() if name not in ("nats", "among_five")
        }
        return facts | {
            "total_nats": self.nats,
            "loss": self.nats / self.images,
            "accuracy": self.right / self.images,
            "top5": self.among_five / self.images,
        }


def evaluate_images(
    trained: Trained,
    *,
    data: Path | str | None = None,
    split: str = "validation",
    samples: int | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Classified:
    """Loss in nats per image, accuracy and top 5 on a split of a prepared data set.

    data: None means the run's own. samples: images, from the first on; None: all.
    batch_size: images at once. precision: None: the run's.
    Images are shown as the trainer's evaluation shows them, standardised as those of training were.
    Raises UserError where data and model do not fit.
    """
    from pretrain.trained.scorer import Scorer

    run = trained.reader.sections
    images, name = images_of(trained, data, split)
    available = images.reader.samples
    if samples is not None and samples > available:
        raise UserError(f"--samples {samples}: the {split} split of {name} has {available} images only")
    count, batch_size = samples or available, batch_size or run.train.micro_batch_size or BATCH
    scorer = Scorer(trained, precision or run.train.precision or "auto")
    nats, among = 0.0, 0
    names = images.reader.facts.classes
    classes = {one: {"images": 0, "right": 0} for one in names}
    for at in range(0, count, batch_size):
        batch = images.batch(range(at, min(at + batch_size, count)))
        losses, ranks = _ranked(scorer.scores(batch), batch["labels"][:, 0])
        nats += float(losses.double().sum())
        among += int((ranks < WITHIN).sum())
        for label, rank in zip(batch["labels"][:, 0].tolist(), ranks.tolist(), strict=True):
            classes[names[label]]["images"] += 1
            classes[names[label]]["right"] += rank == 0
        if progress:
            progress(min(at + batch_size, count), count)
    return Classified(
        checkpoint=str(trained.reader.folder),
        step=trained.reader.step,
        data=f"{split} split of {name}",
        images=count,
        precision=scorer.label,
        nats=nats,
        classes={one: counts for one, counts in classes.items() if counts["images"]},
        among_five=among,
    )


def _ranked(logits_nv: torch.Tensor, labels_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses in nats, and how many classes are likelier; of equal ones the first is."""
    import torch.nn.functional as F

    losses = F.cross_entropy(logits_nv, labels_n, reduction="none")
    order = logits_nv.sort(descending=True, stable=True).indices
    return losses, (order == labels_n[:, None]).int().argmax(1)


def images_of(trained: Trained, data: Path | str | None, split: str) -> tuple[Images, str]:
    """Images of a split as the model has to see them, and the path of their data set.

    Raises UserError for images of other classes than the model knows.
    """
    import torch

    from pretrain.config.sections.augment import Augment
    from pretrain.data.images.augment import View
    from pretrain.data.images.samples import Images
    from pretrain.data.index_cache import cache_folder
    from pretrain.trained.folders.pictures import image_facts
    from pretrain.trained.measures.windows import chosen

    image = trained.config.image
    assert image is not None
    corpora, cache = chosen(trained, data)
    path = corpora[0].path
    found = Images(path, split, image, 0, cache_folder(cache and str(cache), path), Augment())
    facts = image_facts(trained)
    if found.reader.facts.classes != facts.classes:
        other = next(iter(set(found.reader.facts.classes) ^ set(facts.classes)), "their order")
        raise UserError(
            f"data set {path} has other classes than {trained.reader.folder} ({printable(other)}): "
            "prepare images with the same class folders"
        )
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    found.view = View(image.shape[1:], mean, std)
    # Of the training split too: as they are, in the order of the data.
    found.changes = False
    return found, path

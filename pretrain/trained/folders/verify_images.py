"""An exported classifier of images against its run: loss on validation images, logits, classes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from model.errors import UserError
from model.hf.proof import Inputs, change
from model.hf.reference import Evaluation
from pretrain.config.sections.augment import Augment
from pretrain.data.images.samples import Images
from pretrain.data.index_cache import cache_folder
from pretrain.trained.open import Trained

BATCH = 32
SHOWN = 5
"""Validation images of which the predictions are told."""


def validation_images(trained: Trained) -> Images:
    """Those of the data set that the model was trained on."""
    image, path = trained.config.image, trained.corpora()[0].path
    if image is None:
        raise UserError(f"{trained.reader.folder} is no model of images")
    cache = cache_folder(trained.reader.sections.data.cache, path)
    return Images(path, "validation", image, 0, cache, Augment())


def compare(trained: Trained, model: Any, samples: int) -> tuple[float, float]:
    """As `verify_export.Check.compare`."""
    images = validation_images(trained)
    ours = Evaluation(trained.weights, trained.config, logit_scale=trained.logit_scale)
    nats, difference = 0.0, 0.0
    for at in range(0, samples, BATCH):
        batch = images.batch(range(at, min(at + BATCH, samples)))
        inputs = Inputs(batch["images"], images=True)
        logits = model(**inputs.arguments()).logits.float()
        nats += float(F.cross_entropy(logits, batch["labels"][:, 0], reduction="sum").double())
        if not at:
            difference = change(logits, inputs.ask(ours))
    return nats / samples, difference


def sample(trained: Trained, model: Any, processor: Any, prompt: str, loss: float) -> list[str]:
    """As `verify_export.Check.sample`: what the model takes some validation images for.

    prompt: the path of an image instead, if there is one.
    """
    names = model.config.id2label
    if prompt:
        from transformers import pipeline

        told = pipeline("image-classification", model=model, image_processor=processor)(prompt, top_k=3)
        return [f"{prompt}: " + ", ".join(f"{one['label']} {one['score']:.0%}" for one in told)]
    batch = validation_images(trained).batch(range(SHOWN))
    shares, best = model(**Inputs(batch["images"], images=True).arguments()).logits.softmax(-1).max(-1)
    rows = zip(batch["labels"][:, 0].tolist(), best.tolist(), shares.tolist(), strict=True)
    return [
        f"validation image {number} of class {names[label]}: {names[found]} {share:.0%}"
        for number, (label, found, share) in enumerate(rows)
    ]

"""An exported classifier of images against its run: loss on validation images, logits, classes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from model.hf.proof import Inputs, change
from model.hf.reference import Evaluation
from pretrain.trained.measures.classified import images_of
from pretrain.trained.open import Trained

BATCH = 32
SHOWN = 5
"""Validation images of which the predictions are told."""


def compare(trained: Trained, model: Any, samples: int) -> tuple[float, float]:
    """As `verify_export.Check.compare`."""
    images, _ = images_of(trained, None, "validation")
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
    batch = images_of(trained, None, "validation")[0].batch(range(SHOWN))
    shares, best = model(**Inputs(batch["images"], images=True).arguments()).logits.softmax(-1).max(-1)
    rows = zip(batch["labels"][:, 0].tolist(), best.tolist(), shares.tolist(), strict=True)
    return [
        f"validation image {number} of class {names[label]}: {names[found]} {share:.0%}"
        for number, (label, found, share) in enumerate(rows)
    ]

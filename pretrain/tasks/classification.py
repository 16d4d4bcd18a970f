"""Classification: the class of an image is told from its patches (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from model.families.family import Mask
from pretrain.tasks.task import Task

CLASSIFICATION = Task(
    name="classification",
    summary="tell the class of an image",
    mask=Mask.BIDIRECTIONAL,
    inputs="patches",
    samples="images",
    unit="images",
    counted="image",
    sections=("augment",),
    accuracy=True,
    within=5,
)

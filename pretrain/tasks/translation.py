"""Translation: a text in another language is told from the source, word by word."""

from __future__ import annotations

from model.families.family import Mask
from pretrain.tasks.task import Task

TRANSLATION = Task(
    name="translation",
    summary="tell the target of a pair from its source",
    mask=Mask.CAUSAL,
    crossed=True,
    samples="pairs",
    unit="rows of pairs",
)

"""Transcription: the words of a recording are told one by one, as the encoder hears it."""

from __future__ import annotations

from model.families.family import Mask
from pretrain.tasks.task import Task

TRANSCRIPTION = Task(
    name="transcription",
    summary="tell what a recording says",
    mask=Mask.CAUSAL,
    inputs="frames",
    crossed=True,
    samples="clips",
    unit="rows of clips",
    sections=("spec_augment",),
)

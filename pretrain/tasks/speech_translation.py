"""Speech translation: a recording's words in another language are told one by one."""

from __future__ import annotations

from model.families.family import Mask
from pretrain.tasks.task import Task

SPEECH_TRANSLATION = Task(
    name="speech_translation",
    summary="tell a recording's translation",
    mask=Mask.CAUSAL,
    inputs="frames",
    crossed=True,
    samples="clips",
    unit="rows of clips",
    sections=("spec_augment",),
)

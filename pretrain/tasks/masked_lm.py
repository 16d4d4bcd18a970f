"""Masked language modelling: hidden tokens are told from all others (Devlin et al. 2019)."""

from __future__ import annotations

from model.families.family import Mask
from pretrain.tasks.task import Task

MASKED_LM = Task(
    name="masked_lm",
    summary="tell hidden tokens from all others",
    mask=Mask.BIDIRECTIONAL,
    samples="masked",
    sections=("masking",),
    accuracy=True,
)

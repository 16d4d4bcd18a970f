"""Span corruption: hidden parts of a text are told from what is left of it (Raffel et al. 2020)."""

from __future__ import annotations

from model.families.family import Mask
from pretrain.tasks.task import Task

SPAN_CORRUPTION = Task(
    name="span_corruption",
    summary="tell hidden parts of a text from the rest",
    mask=Mask.CAUSAL,
    crossed=True,
    samples="spans",
    unit="texts",
    sections=("spans",),
)

"""Next-token prediction: every token but the first is a target, given those before it."""

from __future__ import annotations

from model.families.family import Mask
from pretrain.tasks.task import Task

CAUSAL_LM = Task(name="causal_lm", summary="predict the next token", mask=Mask.CAUSAL, samples="next_token")

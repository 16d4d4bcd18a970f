"""The table of tasks, by the names that `train.task` takes."""

from __future__ import annotations

from model.families.table import FAMILIES
from pretrain.tasks.causal_lm import CAUSAL_LM
from pretrain.tasks.classification import CLASSIFICATION
from pretrain.tasks.masked_lm import MASKED_LM
from pretrain.tasks.span_corruption import SPAN_CORRUPTION
from pretrain.tasks.speech_translation import SPEECH_TRANSLATION
from pretrain.tasks.task import Task
from pretrain.tasks.transcription import TRANSCRIPTION
from pretrain.tasks.translation import TRANSLATION

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CAUSAL_LM,
        MASKED_LM,
        TRANSLATION,
        SPAN_CORRUPTION,
        CLASSIFICATION,
        TRANSCRIPTION,
        SPEECH_TRANSLATION,
    )
}

OWN_SECTIONS = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.sections))
"""Sections of a configuration that only some tasks read."""


def summaries() -> str:
    """All tasks by name, each in a few words."""
    return "; ".join(f"{task.name}: {task.summary}" for task in TASKS.values())


def suited(family: str) -> list[str]:
    """Names of the tasks that models of a family can learn, the family's own first."""
    return [name for name, task in TASKS.items() if task.suits(FAMILIES[family])]


def task_of(name: str | None, family: str) -> Task:
    """The task of a run: the one named, or the family's own.

    Raises ValueError for a name that is no task's, and for a task that the family cannot learn.
    """
    able = suited(family)
    if not able:
        raise ValueError(f"model.family={family} has no training task yet: choose another family")
    if name is None:
        return TASKS[able[0]]
    if name not in TASKS:
        raise ValueError(f"train.task={name!r} is not a task; choose one of {', '.join(TASKS)}")
    if name not in able:
        families = [other for other in FAMILIES if name in suited(other)]
        raise ValueError(
            f"train.task={name} does not combine with model.family={family}, in which {_sees(family)}: "
            f"set train.task={able[0]} or model.family={' or '.join(families)}"
        )
    return TASKS[name]


def _sees(family: str) -> str:
    if FAMILIES[family].inputs == "frames":
        return "recordings are heard"
    if FAMILIES[family].crossed:
        return "a decoder reads what an encoder makes"
    if FAMILIES[family].inputs == "patches":
        return "images are read"
    return f"a token attends to {FAMILIES[family].stacks[-1].mask.value}"

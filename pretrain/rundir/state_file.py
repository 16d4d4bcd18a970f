"""What state.json and submitted.json hold, key by key, read and checked.

Standard library only, as the batch script's Python reads both.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Annotated, TypedDict, TypeVar, get_type_hints

from model.errors import UserError

LARGEST = 1 << 20
"""Bytes of the largest file that is read."""

TEXT, WHOLE, NUMBER, FLAG, TEXTS, JOB = (
    "text",
    "a whole number",
    "a number",
    "true or false",
    "a list of texts",
    "a job",
)
Text = Annotated[str | None, TEXT]
Whole = Annotated[int | None, WHOLE]
Number = Annotated[float | None, NUMBER]
Flag = Annotated[bool | None, FLAG]
Texts = Annotated[list[str] | None, TEXTS]
Job = Annotated[str | None, JOB]


class State(TypedDict, total=False):
    """What state.json holds; null is as good as no key."""

    # What the run does, and why. step: of the newest checkpoint, or the end.
    state: Text
    reason: Text
    step: Whole
    exit_code: Whole
    # Who wrote this, and when (seconds since 1970). began: of that process, in the kernel's ticks.
    updated: Number
    host: Text
    pid: Whole
    began: Whole
    # The start that owns the run directory. job_id: null without Slurm; supervised: a batch script
    # waits for its end.
    job_id: Job
    restart_count: Whole
    start: Text
    supervised: Flag
    # Starts of this submission before the newest; those in a row that left no new checkpoint; the
    # newest checkpoint when the newest began.
    restarts: Whole
    stalled: Whole
    start_step: Whole
    # The job's end (seconds since 1970), its nodes, and those it does not use again.
    ends_at: Number
    nodes: Text
    excluded: Texts


class Submitted(TypedDict, total=False):
    """What submitted.json holds."""

    jobs: Texts
    """Handles of Slurm; more than one is a chain."""
    time: Number
    log: Text
    nodes: Text


Content = TypeVar("Content", State, Submitted)


def read_state_file(path: Path, kind: type[Content]) -> Content:
    """What a file holds, empty where there is none.

    Raises UserError for one that is damaged.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > LARGEST:
            raise ValueError("no regular file of its size")
        content = json.loads(path.read_text(encoding="utf-8"))
        _check(content, kind)
    except (FileNotFoundError, NotADirectoryError):
        return kind()
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it; checkpoints and metrics are not affected"
        ) from None
    return content


def _check(content: object, kind: type[Content]) -> None:
    """Raises ValueError where parsed JSON is not what the keys of `kind` say."""
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    for key, hint in get_type_hints(kind, include_extras=True).items():
        (words,) = hint.__metadata__
        if content.get(key) is not None and not _fits(content[key], words):
            raise ValueError(f"{key} is not {words}")


def _fits(value: object, kind: str) -> bool:
    if kind == TEXTS:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if kind == FLAG:
        return isinstance(value, bool)
    if kind == JOB:  # also a word of Slurm's commands
        return isinstance(value, str) and re.fullmatch(r"\w[\w.+-]*", value) is not None
    if kind == TEXT:
        return isinstance(value, str)
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return whole or (kind == NUMBER and isinstance(value, float) and 0 <= value < 2**63)

"""Section `checkpoint`."""

from __future__ import annotations

from pydantic import Field

from model.sections import Strict
from pretrain.config.sections.limits import MINUTES, STEPS, FilePath


class CheckpointConfig(Strict):
    """When to save, what to keep, where to continue from."""

    interval: int = Field(
        0,
        ge=0,
        le=STEPS,
        description=(
            "Steps between checkpoints; 0: none by steps. At the end and on request there is one in any case."
        ),
    )
    minutes: float = Field(
        0.0,
        ge=0,
        le=MINUTES,
        description="Also save when the last save is this many minutes ago; 0: none by time.",
    )
    asynchronous: bool = Field(
        False,
        description=(
            "Training stands still for a copy to host memory only and "
            "goes on while that is written. Needs host memory for the copy."
        ),
    )
    leave_after_minutes: float = Field(
        0.0,
        ge=0,
        le=MINUTES,
        description=(
            "Save and leave with exit code 75 after the first step "
            "that ends later than this after the start; 0: never."
        ),
    )
    keep_last: int = Field(2, ge=1, le=STEPS, description="Newest checkpoints kept.")
    keep_every: int = Field(
        0, ge=0, le=STEPS, description="Also keep every checkpoint whose step is a multiple of this; 0: none."
    )
    load: FilePath | None = Field(
        None, description="Start from this checkpoint folder when the run directory has none yet."
    )

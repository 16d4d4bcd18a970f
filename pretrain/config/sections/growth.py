"""What grows over the first steps of a run: samples of a step, and tokens of a sequence.

Both are functions of the step alone, so that a run resumes exactly wherever it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, model_validator

from model.sections import Strict
from pretrain.config.sections.limits import SAMPLES, STEPS


class BatchRampup(Strict):
    """Batch-size ramp-up: steps of few samples first (Smith et al. 2018; GPT-3)."""

    start: int | None = Field(
        None, ge=1, le=SAMPLES, description="Samples of the first step; null: train.global_batch_size."
    )
    increment: int | None = Field(
        None, ge=1, le=SAMPLES, description="Samples that come in at a time; null: as many as start."
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=STEPS,
        description="Steps until train.global_batch_size is reached, in equal stages. Learning rates follow "
        "steps whatever their size.",
    )

    @model_validator(mode="after")
    def _check(self) -> BatchRampup:
        _together("schedule.batch_rampup", self, ("start", "steps"))
        if self.start is None and self.increment is not None:
            raise ValueError(
                f"schedule.batch_rampup.increment={self.increment} has no effect without "
                "schedule.batch_rampup.start: give that or remove it"
            )
        return self


class LengthWarmup(Strict):
    """Sequence-length warm-up: windows are read in shorter pieces first (Li et al. 2022).

    A piece knows nothing of the one before it. No token is left out, and steps have as many tokens
    as later ones.
    """

    start: int | None = Field(
        None,
        ge=1,
        le=1 << 26,
        description="Tokens of a sequence in the first step, which doubles until it is data.seq_length; "
        "null: no warm-up.",
    )
    steps: int | None = Field(
        None, ge=1, le=STEPS, description="Steps until data.seq_length is reached, in equal stages."
    )

    @model_validator(mode="after")
    def _check(self) -> LengthWarmup:
        _together("schedule.seq_length_warmup", self, ("start", "steps"))
        return self


def _together(section: str, given: Strict, names: tuple[str, str]) -> None:
    for name, other in (names, names[::-1]):
        if getattr(given, name) is not None and getattr(given, other) is None:
            raise ValueError(
                f"{section}.{name}={getattr(given, name)} needs {section}.{other}: give it, or remove both"
            )


@dataclass(frozen=True)
class Growth:
    """A number that rises in equal stages over the first steps."""

    values: tuple[int, ...]
    """Of each stage; the last one stays."""
    steps: int = 0
    """Before the last one."""

    @property
    def last(self) -> int:
        """The number in the end."""
        return self.values[-1]

    @property
    def grows(self) -> bool:
        """Whether there is more than one."""
        return len(self.values) > 1

    def at(self, step: int) -> int:
        """In 0-based step `step`."""
        if step >= self.steps:
            return self.last
        return self.values[step * (len(self.values) - 1) // self.steps]

    def before(self, step: int) -> int:
        """The sum over the first `step` steps."""
        stages = len(self.values) - 1
        total, begin = 0, 0
        for number, value in enumerate(self.values[:-1], 1):
            end = min(-(-number * self.steps // stages), step)
            total += value * (end - begin)
            begin = end
        return total + self.last * (step - begin)

    def __str__(self) -> str:
        """In words."""
        if not self.grows:
            return f"{self.last}"
        return f"{self.values[0]} to {self.last} over {self.steps:,} steps"


def batch_growth(ramp: BatchRampup, size: int) -> Growth:
    """Samples of a step. size: `train.global_batch_size`.

    Raises ValueError where stages do not lead there.
    """
    if ramp.start is None or ramp.steps is None:
        return Growth((size,))
    by, name = ramp.increment or ramp.start, "schedule.batch_rampup"
    if ramp.start >= size:
        raise ValueError(
            f"{name}.start={ramp.start} has no effect with train.global_batch_size={size}: "
            "give a smaller one or remove it"
        )
    if (size - ramp.start) % by:
        raise ValueError(
            f"{name}.increment={by} does not lead from {name}.start={ramp.start} to "
            f"train.global_batch_size={size}: give one that divides {size - ramp.start}"
        )
    values = tuple(range(ramp.start, size + 1, by))
    _check_stages(name, values, ramp.steps)
    return Growth(values, ramp.steps)


def length_growth(warmup: LengthWarmup, length: int) -> Growth:
    """Tokens of a sequence. length: `data.seq_length`.

    Raises ValueError where doubling does not lead there.
    """
    if warmup.start is None or warmup.steps is None:
        return Growth((length,))
    name, values = "schedule.seq_length_warmup", [warmup.start]
    if warmup.start >= length:
        raise ValueError(
            f"{name}.start={warmup.start} has no effect with data.seq_length={length}: "
            "give a smaller one or remove it"
        )
    while values[-1] < length:
        values.append(2 * values[-1])
    if values[-1] != length:
        raise ValueError(
            f"{name}.start={warmup.start} does not double to data.seq_length={length}: give data.seq_length "
            "divided by a power of two"
        )
    _check_stages(name, values, warmup.steps)
    return Growth(tuple(values), warmup.steps)


def _check_stages(name: str, values: tuple[int, ...] | list[int], steps: int) -> None:
    if steps < len(values) - 1:
        raise ValueError(f"{name}.steps={steps} are fewer than its {len(values) - 1} stages: give more")

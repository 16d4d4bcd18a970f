"""Learning rate over steps."""

from __future__ import annotations

from pretrain.config.schema import ScheduleConfig
from pretrain.config.sections.schedules import SCHEDULES, Place


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """Rate of 1-based step `step` of `total`.

    Linear warm-up from 0, then the configured shape down to `min_lr_ratio` of the peak.
    A decay whose length is not given keeps clear of the warm-up.
    """
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    decay = schedule.decay_steps or max(1, min(total // 10, total - warmup))
    shape = SCHEDULES[schedule.kind]
    height = shape.height(Place(step, total, warmup, decay))
    floor = schedule.min_lr_ratio if shape.has_floor else 0.0
    return peak * (floor + (1 - floor) * height)


def remark(schedule: ScheduleConfig, total: int) -> str:
    """What is unusual about a schedule of `total` steps, in words; empty where nothing is."""
    warmup = schedule.warmup_steps
    if warmup <= total:
        return ""
    return (
        f"schedule.warmup_steps={warmup} is longer than the run (train.steps={total}), "
        f"whose learning rate ends at {total / warmup:.0%} of its peak"
    )

"""What of a step is shown where."""

from __future__ import annotations

from typing import get_args

from pretrain.train.callbacks.base import StepRecord
from pretrain.train.callbacks.scalars import SCALARS, Scalar

NOT_SHOWN = {
    "step": "the axis of all curves",
    "tokens": "follows from the step",
    "step_time_s": "the speed shows it",
    "skipped": "its loss is not finite, or its line says so",
    "graph_capture_s": "of a few steps only",
    "signal": "has curves of its own (`on_signal`)",
    "batch_size": "has a curve of its own while it grows",
    "seq_length": "has a curve of its own while it grows",
}
"""Field of a step -> why TensorBoard has no curve of it."""


def test_every_number_of_a_step_has_a_curve_or_a_reason() -> None:
    fields = set(StepRecord.__annotations__) | StepRecord.__required_keys__
    assert fields == set(SCALARS) | set(NOT_SHOWN)
    assert not set(SCALARS) & set(NOT_SHOWN)
    assert get_args(Scalar) == tuple(SCALARS)

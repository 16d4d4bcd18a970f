"""Learning-rate schedules: end points, shape, and no dependence on anything but the step."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any, get_args

import pytest

from pretrain.config.schema import RunConfig, ScheduleConfig
from pretrain.config.sections.schedules import SCHEDULES
from pretrain.train.learning_rate import learning_rate, remark
from tests.parallel.training import run_config

TOTAL, PEAK = 100, 2.0


def rates(**settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    return [learning_rate(schedule, PEAK, step, TOTAL) for step in range(1, TOTAL + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(kind: str) -> None:
    curve = rates(kind=kind, warmup_steps=10)
    assert curve[:10] == pytest.approx([PEAK * step / 10 for step in range(1, 11)])


@pytest.mark.parametrize(
    ("kind", "last"), [("cosine", 0.2), ("linear", 0.2), ("wsd", 0.2), ("constant", 2.0)]
)
def test_last_rate(kind: str, last: float) -> None:
    assert rates(kind=kind, warmup_steps=10, min_lr_ratio=0.1)[-1] == pytest.approx(last)


def test_cosine_and_linear_are_half_way_down_in_the_middle() -> None:
    for kind in ("cosine", "linear"):
        assert learning_rate(ScheduleConfig(kind=kind, min_lr_ratio=0.0), PEAK, 50, TOTAL) == pytest.approx(
            1.0
        )  # type: ignore[arg-type]


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    curve = rates(kind="wsd", decay_steps=20, min_lr_ratio=0.0)
    assert curve[:80] == [PEAK] * 80
    assert curve[89] == pytest.approx(1.0)


def test_curves_never_rise_after_warm_up() -> None:
    for kind in ("cosine", "linear", "wsd"):
        curve = rates(kind=kind, warmup_steps=5)[4:]
        assert curve == sorted(curve, reverse=True)


def test_decay_steps_without_wsd_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.decay_steps=5 has no effect"):
        ScheduleConfig(kind="cosine", decay_steps=5)


@pytest.mark.parametrize("warmup", [0, 90, 95, 100, 101, 1000])
def test_a_decay_of_no_given_length_keeps_clear_of_the_warm_up(warmup: int) -> None:
    curve = rates(kind="wsd", warmup_steps=warmup)
    largest = max(abs(after - before) for before, after in pairwise(curve))
    assert (
        largest <= PEAK / min(10, TOTAL - warmup) + 1e-9
        if warmup < TOTAL
        else largest <= PEAK / warmup + 1e-9
    )


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        (
            {"kind": "wsd", "decay_steps": 100},
            10,
            "do not fit into train.steps=10: set schedule.decay_steps=10 or less",
        ),
        ({"kind": "wsd", "decay_steps": 5, "warmup_steps": 6}, 10, "set schedule.decay_steps=4 or less"),
        ({"kind": "wsd", "decay_steps": 5, "warmup_steps": 20}, 10, "set fewer schedule.warmup_steps"),
        ({"kind": "wsd", "decay_steps": 5, "warmup_steps": 5}, 10, ""),
        ({"kind": "cosine", "warmup_steps": 20}, 10, ""),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(
    schedule: dict[str, Any], steps: int, message: str
) -> None:
    values = run_config().model_dump()
    values["schedule"], values["train"]["steps"] = schedule, steps
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        RunConfig.model_validate(values)


def test_a_warm_up_that_is_longer_than_the_run_is_said() -> None:
    assert remark(ScheduleConfig(warmup_steps=100), 100) == ""
    assert remark(ScheduleConfig(warmup_steps=200), 50) == (
        "schedule.warmup_steps=200 is longer than the run (train.steps=50), "
        "whose learning rate ends at 25% of its peak"
    )


def test_the_configuration_offers_every_shape_and_each_has_a_peak_and_a_floor() -> None:
    assert get_args(ScheduleConfig.model_fields["kind"].annotation) == tuple(SCHEDULES)
    for kind, shape in SCHEDULES.items():
        schedule = ScheduleConfig(kind=kind, warmup_steps=10)  # type: ignore[arg-type]
        rates = [learning_rate(schedule, 1.0, step, 1000) for step in range(1, 1001)]
        assert rates[9] == 1.0
        assert all(later <= earlier for earlier, later in pairwise(rates[9:])), kind
        # inverse_sqrt has no floor; the root of 10 steps of warm-up / 1000 steps is 0.1 too.
        falls = shape.has_floor or kind == "inverse_sqrt"
        assert rates[-1] == pytest.approx(0.1 if falls else 1.0)


def test_the_inverse_root_is_that_of_the_steps_over_the_warm_up() -> None:
    schedule = ScheduleConfig(kind="inverse_sqrt", warmup_steps=4)
    rates = [learning_rate(schedule, 2.0, step, 1000) for step in (1, 2, 4, 16, 64, 100)]
    assert rates == pytest.approx([0.5, 1.0, 2.0, 1.0, 0.5, 0.4])

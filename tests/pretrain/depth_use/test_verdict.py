"""What is said about measurements that are made up."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest

from pretrain.depth_use.measure import LayerUse, Measured, Plan, Prediction, Skip
from pretrain.depth_use.runs import DepthUse, Run
from pretrain.depth_use.verdict import carriers, effective_depth, table, verdict

QUIET = 0.0005


def skips(changes: list[float], width: int = 1, error: float | None = 0.0) -> tuple[Skip, ...]:
    return tuple(
        Skip(index * width + 1, (index + 1) * width, 3.0 + change, change, error)
        for index, change in enumerate(changes)
    )


def made_up(
    singles: list[float], blocks: list[float], divergences: list[float], error: float | None = 0.0
) -> DepthUse:
    """A model with a layer for each change in `singles`."""
    measured = Measured(
        3.0,
        100,
        skips(singles, error=error),
        skips(blocks, len(singles) // len(blocks), error),
        tuple(LayerUse(number, 0.1, 0.2, 0.9) for number in range(1, len(singles) + 1)),
        tuple(Prediction(place, 3.0 + d, d, 1 - d / 4) for place, d in enumerate(divergences)),
    )
    run = Run("deep", cast(Any, None), Plan.of(len(singles)), "made up", 16, ())
    return DepthUse(run, "fp32", measured)


def test_the_line() -> None:
    use = made_up(
        [0.2, 0.1, QUIET, -0.3, QUIET, 0.05, QUIET, 0.1],
        [0.5, 0.0, 0.1, 0.4],
        [4.0, 3.0, 1.5, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0],
    )
    # After layer 2, too, half is made, but layer 3 undoes it.
    assert verdict(use) == (
        "deep: half of the prediction is made by layer 4 of 8; "
        "layers 1 to 8 carry 100% of what skipping blocks costs; "
        "4 of the 8 layers are missed alone (most: layer 1, +0.200), none of layers 3 to 5"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([0.1, 0.1, 0.81, 0.0], (5, 6, 0.81 / 1.01)),
        ([0.3, 0.52, 0.1, 0.1], (1, 4, 0.82 / 1.02)),
        ([0.1, 0.4, 0.4, 0.09], (3, 6, 0.8 / 0.99)),
        ([-9.0, 0.4, QUIET, 0.4], (3, 8, 1.0)),
        ([QUIET, -1.0, 0.0, 0.0], None),
    ],
)
def test_the_fewest_neighbours_that_carry_most(
    changes: list[float], expected: tuple[int, int, float] | None
) -> None:
    found = carriers(skips(changes, 2))
    assert found == (None if expected is None else (*expected[:2], pytest.approx(expected[2])))


def test_changes_within_chance_are_none() -> None:
    use = made_up([0.01, 0.02], [0.01, 0.02], [1.0, 0.5, 0.0], error=0.011)
    assert verdict(use) == (
        "deep: half of the prediction is made by layer 1 of 2; no block of layers is missed when it is "
        "skipped; none of the 2 layers is missed alone (changes of the loss below 0.02)"
    )
    # A single window has no error.
    assert "2 of the 2 layers" in verdict(made_up([0.01, 0.02], [0.01, 0.02], [1.0, 0.5, 0.0], error=None))


def test_what_is_not_finite_is_said() -> None:
    line = verdict(made_up([math.nan, 0.1], [math.nan, 0.1], [1.0, math.nan, 0.0]))
    assert "the prediction on the way is not finite" in line
    assert "the loss without some block of layers is not finite" in line
    assert "most: layer 1, +nan" in line


def test_a_model_that_predicts_before_its_layers() -> None:
    assert effective_depth(made_up([0.1], [0.1], [0.0, 0.0]).measured) == 0


@pytest.mark.parametrize("blocks", [2, 4])
def test_a_row_of_the_table_is_a_block(blocks: int) -> None:
    use = made_up([0.01, 0.03, 0.05, 0.07], [0.2] * blocks, [2.0, 1.5, 1.0, 0.5, 0.0])
    rows = [line.split() for line in table(use).splitlines()[-blocks:]]
    if blocks == 2:
        assert [row[:3] for row in rows] == [["1-2", "+0.2000", "+0.0200"], ["3-4", "+0.2000", "+0.0600"]]
        assert rows[0][3:] == ["0.100", "0.200", "0.900", "4.0000", "1.0000", "75%"]
    else:
        assert [row[0] for row in rows] == ["1", "2", "3", "4"]

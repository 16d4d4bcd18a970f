"""Shares of branches over steps: the formulas of the authors' code, evaluated with numpy."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from model.depth.ramp import RAMPS, end, share
from pretrain.config.schema import BranchConfig

LAYERS, SPAN = 6, 5


def published(kind: str, done: int) -> np.ndarray:
    """Shares of all layers after `done` steps, in the terms of the authors' code.

    Theirs are the steps of each layer, evenly from the first one's to all steps of the warm-up.
    """
    steps = np.linspace(SPAN, SPAN * LAYERS, LAYERS)
    if kind == "equal":
        return np.clip(done / np.full(LAYERS, SPAN * LAYERS), 0.0, 1.0)
    if kind == "stagewise":
        before = np.concatenate(([0], steps[:-1]))
        return np.clip((done - before) / np.diff(steps, prepend=0), 0.0, 1.0)
    return np.clip((done / steps) ** (2 if kind == "linear_square" else 1), 0.0, 1.0)


@pytest.mark.parametrize("kind", RAMPS)
def test_shares_are_the_published_ones(kind: str) -> None:
    for done in range(SPAN * LAYERS + 3):
        ours = [share(kind, layer, LAYERS, SPAN, done) for layer in range(1, LAYERS + 1)]
        assert ours == pytest.approx(published(kind, done), rel=1e-15, abs=1e-15)


@pytest.mark.parametrize("kind", RAMPS)
def test_all_is_whole_at_the_end_and_not_before(kind: str) -> None:
    for layers in (1, 7, 1000):
        last = end(layers, SPAN)
        assert all(share(kind, layer, layers, SPAN, last) == 1.0 for layer in (1, layers))
        assert share(kind, layers, layers, SPAN, last - 1) < 1.0


def test_the_configuration_knows_every_kind() -> None:
    assert get_args(BranchConfig.model_fields["kind"].annotation) == ("none", *RAMPS)

"""Factors on rate, epsilon and decay: a step against Adam's closed form, layouts, resumption."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.engine.gradients import GradientBuffer
from pretrain.config.sections.factors import role_of
from tests.distributed import Group, launch
from tests.parallel.checkpoint.states import bring, keep
from tests.parallel.layouts import FP32, FULL, OPTIMIZER, SP, Case, Row, measure, selected
from tests.parallel.training import (
    batches_of,
    engine_of,
    forward_step,
    given,
    run_config,
    train,
    whole_parameters,
)

LR, EPS, DECAY = 1e-2, 1e-3, 0.1
MODEL = given(scheme="b2t", scheme_options=given(branch=2.0), tie_embeddings=False)
FACTORS = given(
    embedding=given(rate="sqrt(hidden)", eps=2.0, decay=0.25),
    stream_norm=given(rate="1/layers"),
    norm=given(rate=0.5),
    bias=given(rate="1/sqrt(layers)", eps=8.0),
    hidden=given(rate=0.75, eps=4.0, decay=3.0),
    output=given(rate=2.0, decay=0.5),
)
VALUES = {
    "embedding": (32**0.5, 2.0, 0.25),
    "stream_norm": (1 / 4, 1.0, 0.0),
    "norm": (0.5, 1.0, 0.0),
    "bias": (0.5, 8.0, 0.0),
    "hidden": (0.75, 4.0, 3.0),
    "output": (2.0, 1.0, 0.5),
}
"""Rate, epsilon and decay of each role at 4 layers of width 32; norms and biases do not decay."""
RECIPE = given(
    embedding=given(rate="sqrt(hidden)"),
    stream_norm=given(rate="1/layers"),
    bias=given(rate=0.5, eps=2.0),
    hidden=given(decay=2.0),
)
MUON = given(kind="muon", factors=given(embedding=given(rate=3.0), hidden=given(rate=0.5, decay=2.0)))
TIED = given(scheme="b2t", scheme_options=given(branch=2.0))
FOUR = given(tensor=2, pipeline=2, sequence_parallel=True)
CASES = [
    Case("ZeRO-0", 1, given(zero=0), TIED, optimizer=given(factors=RECIPE), exact=True),
    Case("ZeRO-3", 1, given(zero=3), TIED, optimizer=given(factors=RECIPE), exact=True),
    Case("TP2 + SP", 2, SP, TIED, optimizer=given(factors=RECIPE)),
    Case("PP2 interleaved", 2, given(pipeline=2, virtual_stages=2), TIED, optimizer=given(factors=RECIPE)),
    Case("DP2, ZeRO-2", 2, given(zero=2), TIED, optimizer=given(factors=RECIPE)),
    Case("DP2, ZeRO-3", 2, given(zero=3) | FULL, TIED, optimizer=given(factors=RECIPE)),
    Case("DP2, Muon", 2, {}, TIED, optimizer=MUON),
    Case("TP2 x PP2 + SP", 4, FOUR, TIED, optimizer=given(factors=RECIPE)),
]


def distances_from_closed_form() -> dict[str, float]:
    """Runs inside one rank. Largest error of a first step, in steps, by role.

    Adam's first step is rate x g / (|g| + eps), after a decay by rate x weight decay.
    """
    config = run_config(
        MODEL, lr=LR, eps=EPS, weight_decay=DECAY, decay_embeddings=True, clip_grad=0.0, factors=FACTORS
    )
    engine = engine_of(config)
    before, _ = whole_parameters(engine)
    gradients: dict[str, torch.Tensor] = {}

    def look() -> None:
        for buffer in engine.buffers:
            assert isinstance(buffer, GradientBuffer)
            for named, view in zip(buffer.group.parameters, buffer.views, strict=True):
                gradients[named.name] = view.clone()

    engine.set_lr(LR)
    batches = batches_of(config, engine, 0)
    engine.train_step(forward_step, functools.partial(iter, batches), len(batches), inspect=look)
    after, _ = whole_parameters(engine)
    errors = dict.fromkeys(VALUES, 0.0)
    for row in (named.row for named in engine.parameters):
        rate, eps, decay = VALUES[role_of(row)]
        old, gradient = before[row.name].double(), gradients[row.name].double()
        expected = old * (1 - LR * rate * DECAY * decay) - LR * rate * gradient / (gradient.abs() + EPS * eps)
        error = float((after[row.name].double() - expected).abs().max()) / (LR * rate)
        errors[role_of(row)] = max(errors[role_of(row)], error)
    return errors


def resumed_with_other_factors() -> bool:
    """Runs inside one rank: factors in force are the configuration's, not the checkpoint's."""

    def config(rate: float) -> Any:
        return run_config(TIED, **(OPTIMIZER | given(factors=given(embedding=given(rate=rate)))))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        first = config(8.0)
        engine = engine_of(first)
        train(first, engine, 0, 1)
        keep(engine, first, path, 1)
        second = config(0.25)
        engine = engine_of(second)
        bring(engine, path)
        train(second, engine, 1, 2)
        rates = {
            group["lr"] / second.optimizer.lr
            for group, own in zip(engine.deepspeed.optimizer.param_groups, engine.groups, strict=True)
            if any(role_of(named.row) == "embedding" for named in own.parameters)
        }
        return rates == {0.25}


def on_one_rank() -> dict[str, Any]:
    return {"errors": distances_from_closed_form(), "resumed": resumed_with_other_factors()}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return launch(Group(1, on_one_rank))[0][0]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> dict[str, Row]:
    return measure(selected(request, CASES))


@pytest.mark.parametrize("role", VALUES)
def test_a_step_is_that_of_the_closed_form(role: str, found: dict[str, Any]) -> None:
    # A weight near 1 is rounded by 6e-8, which is 2.4e-5 of the smallest step of 2.5e-3.
    assert 0 < found["errors"][role] < 5e-5


def test_a_resumed_run_has_its_own_factors(found: dict[str, Any]) -> None:
    assert found["resumed"]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_layouts_equal_one_process(case: Case, rows: dict[str, Row]) -> None:
    row = rows[case.name]
    assert not row.unequal
    assert row.loss <= FP32.loss
    assert row.norm <= FP32.norm
    assert row.parameters <= FP32.parameters * 32**0.5  # the table's steps are so many times larger
    assert row.identical or not case.exact

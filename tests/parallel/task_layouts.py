"""Other tasks than the next token under any layout, and as one process. Parts run inside ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from parallel.engine.engine import Engine
from pretrain.tasks.task import Batch, Task
from pretrain.train.steps import evaluation_step, training_step
from tests.distributed import Group, launch
from tests.parallel.training import whole_parameters

Model = dict[str, Any]
Layout = tuple[int, dict[str, Any], str]
"""Processes, section `parallel`, and which of the models."""


def outcome(
    engine: Engine, task: Task, batches: Callable[[int], list[Batch]], held_out: list[Batch], steps: int
) -> dict[str, Any]:
    """What some steps and an evaluation give, the same on all ranks. batches: of a step."""
    losses, norms = [], []
    for step in range(steps):
        result = engine.train_step(
            training_step(task), functools.partial(iter, of_step := batches(step)), len(of_step)
        )
        losses.append(result.loss)
        norms.append(result.grad_norm)
    sums = engine.evaluate(evaluation_step(task), functools.partial(iter, held_out), len(held_out), task.sums)
    parameters, unequal = whole_parameters(engine)
    return {"losses": losses, "norms": norms, "sums": sums, "parameters": parameters, "unequal": unequal}


def measured(
    train: Callable[..., Any], models: Mapping[str, Model], layouts: Mapping[str, Layout]
) -> dict[str, Any]:
    """Outcomes of `train(model, layout)`: of each model on one process, and of each layout."""
    groups = {name: Group(1, train, (model, {})) for name, model in models.items()}
    groups |= {
        name: Group(world, train, (models[kind], layout)) for name, (world, layout, kind) in layouts.items()
    }
    return {name: ranks[0] for name, ranks in zip(groups, launch(*groups.values()), strict=True)}


def assert_same(ours: dict[str, Any], one: dict[str, Any]) -> None:
    """Two outcomes are equal but for rounding, and their counts are the same."""
    assert not ours["unequal"]
    assert ours["losses"] == pytest.approx(one["losses"], rel=2e-6)
    assert ours["norms"] == pytest.approx(one["norms"], rel=2e-5)
    assert ours["sums"] == pytest.approx(one["sums"], rel=2e-6)
    assert ours["sums"][1:] == one["sums"][1:]
    assert ours["parameters"].keys() == one["parameters"].keys()
    for parameter, value in one["parameters"].items():
        torch.testing.assert_close(ours["parameters"][parameter], value, rtol=1e-5, atol=1e-5)

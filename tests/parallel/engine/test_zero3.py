"""ZeRO-3: what a rank holds between steps.

Evaluation and skipped steps in between leave the training as at ZeRO-1.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor, nn

from parallel.engine.engine import Engine
from pretrain.config.schema import RunConfig
from pretrain.tasks.causal_lm import CAUSAL_LM
from pretrain.train.steps import evaluation_step
from tests.distributed import Group, gather, launch
from tests.parallel.training import (
    batches_of,
    engine_of,
    forward_step,
    given,
    run_config,
    train,
    whole_parameters,
)

MODEL = given(
    hidden_size=33, num_attention_heads=3, num_layers=3
)  # odd sizes: pieces of two ranks need padding


def poisoned(iterator: Any, chunk: nn.Module) -> Any:
    output, loss_of = forward_step(iterator, chunk)
    return output, lambda losses: loss_of(losses * float("nan"))


def eventful(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """Two steps, an evaluation, a step that is skipped, two more steps."""
    first = train(config, engine, 0, 2)
    batches = batches_of(config, engine, 7)
    held_out = evaluation_step(CAUSAL_LM)
    evaluated, _ = engine.evaluate(held_out, functools.partial(iter, batches), len(batches), CAUSAL_LM.sums)
    skipped = engine.train_step(poisoned, functools.partial(iter, batches), len(batches))
    second = train(config, engine, 2, 4)
    parameters, unequal = whole_parameters(engine)
    return {
        "losses": first.losses + second.losses,
        "norms": first.norms + second.norms,
        "evaluated": evaluated,
        "skipped": not skipped.applied,
        "parameters": parameters,
        "unequal": unequal,
    }


def held(engine: Engine) -> dict[str, int]:
    """Elements on this rank between steps, and of the whole model.

    Those of weights, gradients and master weights.
    """
    return {
        "whole": sum(int(named.parameter.ds_numel) for named in engine.parameters),  # type: ignore[attr-defined,misc]
        "gathered": sum(named.parameter.numel() for named in engine.parameters),
        "weights": sum(int(named.parameter.ds_tensor.numel()) for named in engine.parameters),  # type: ignore[attr-defined,misc]
        "gradients": sum(buffer.partition.numel() for buffer in engine.buffers),
        "masters": sum(master.numel() for master in engine.masters),
    }


def two_ranks() -> dict[str, Any]:
    """Runs inside two ranks."""
    found: dict[str, Any] = {}
    for stage in (1, 3):
        # For epsilon see tests.parallel.layouts: a key bias has no gradient but for rounding.
        config = run_config(MODEL, given(zero=stage), eps=1e-6)
        engine = engine_of(config)
        found[f"stage {stage}"] = eventful(config, engine)
    found["held"] = gather(held(engine))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return launch(Group(2, two_ranks))[0][0]


def test_evaluation_and_skipped_steps_change_nothing(found: dict[str, Any]) -> None:
    ours, theirs = found["stage 3"], found["stage 1"]
    assert ours["skipped"]
    assert theirs["skipped"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
    assert ours["evaluated"] == pytest.approx(theirs["evaluated"], rel=1e-6)
    assert not ours["unequal"]

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    assert max(apart(value, theirs["parameters"][name]) for name, value in ours["parameters"].items()) < 5e-5


def test_a_rank_holds_its_share(found: dict[str, Any]) -> None:
    for rank in found["held"]:
        assert rank["gathered"] == 0
        # One element of padding at most for each parameter.
        for kind in ("weights", "gradients", "masters"):
            assert rank["whole"] / 2 <= rank[kind] <= rank["whole"] / 2 * 1.01

"""Steps by a CUDA graph are the steps without one, on real graphs.

For every scheme, both kinds of kernels, every FP8 recipe the GPU has.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from model.depth.schemes import SCHEMES
from parallel.engine.engine import Engine
from parallel.engine.step_graph import WARM_UP
from parallel.hardware.precision import RECIPES
from parallel.launch.one_process import single_process
from pretrain.data.samples import next_tokens
from pretrain.train.build import build_engine
from tests.gpu.gpu_models import tokens
from tests.gpu.test_gpu_numerics import needs
from tests.gpu.test_gpu_training import BATCH, MICRO, RATE, run_config
from tests.parallel.training import DROPOUT, forward_step

STEPS = WARM_UP + 5
BF16, FP8 = 2e-3, 2e-2
"""Relative tolerances of losses.

A captured product may get another algorithm,
and atomic additions in attention's backward pass come in any order.
"""


def losses_of(engine: Engine, *, watched: int | None = None) -> list[float]:
    """Losses of steps on tokens that differ from step to step. watched: a step that is."""
    engine.set_lr(RATE)
    losses = []
    for step in range(STEPS):
        batches = [next_tokens(tokens(10 * step + part, MICRO)) for part in range(BATCH // MICRO)]
        result = engine.train_step(
            forward_step, functools.partial(iter, batches), len(batches), watched=step == watched
        )
        assert result.applied
        losses.append(result.loss)
    return losses


def check(tolerance: float, **fields: Any) -> None:
    eager = losses_of(build_engine(run_config(**fields), single_process()))
    engine = build_engine(run_config(**fields, cuda_graph=True), single_process())
    assert losses_of(engine) == pytest.approx(eager, rel=tolerance)
    assert engine.graph is not None
    assert engine.graph.graph is not None


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("kernels", ["local", pytest.param("te", marks=pytest.mark.te)])
def test_graph_equals_eager(kernels: str, scheme: str) -> None:
    check(BF16, scheme=scheme, precision="bf16", kernels=kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["local", pytest.param("te", marks=pytest.mark.te)])
def test_graph_of_compiled_parts_equals_eager(kernels: str) -> None:
    # With Transformer Engine's kernels only joins of several operations are compiled, as in B2T.
    scheme = {"local": "deepscalelm_pre_ln", "te": "b2t"}[kernels]
    check(BF16, scheme=scheme, precision="bf16", kernels=kernels, compile=True)


AGAIN = {"recompute": {"granularity": "full"}}


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["local", pytest.param("te", marks=pytest.mark.te)])
@pytest.mark.parametrize("more", [DROPOUT, AGAIN])
def test_graph_that_drops_or_computes_again_equals_eager(more: dict[str, Any], kernels: str) -> None:
    """Replays draw from both streams what eager steps would."""
    check(BF16, scheme="pre_ln", precision="bf16", kernels=kernels, **more)


@pytest.mark.gpu
def test_compiled_layers_that_drop_and_compute_again_repeat_themselves() -> None:
    fields: dict[str, Any] = {"scheme": "pre_ln", "precision": "bf16", "kernels": "local", "compile": True}
    first, second, again = (
        losses_of(build_engine(run_config(**fields, **DROPOUT, **more), single_process()))
        for more in ({}, {}, AGAIN)
    )
    assert second == pytest.approx(first, rel=BF16)
    assert again == pytest.approx(first, rel=BF16)


@pytest.mark.te
@pytest.mark.parametrize("scheme", ["pre_ln", "b2t"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_graph_equals_eager_in_fp8(recipe: str, scheme: str) -> None:
    """The second micro-batch of a step reuses the first one's casts of weights.

    Inside the graph as outside.
    """
    needs(recipe)
    check(FP8, scheme=scheme, precision="bf16", fp8={"recipe": recipe})


@pytest.mark.gpu
def test_a_watched_step_frees_the_graph_and_the_next_one_captures_again() -> None:
    config = run_config(scheme="pre_ln", precision="bf16", kernels="local", cuda_graph=True)
    engine = build_engine(config, single_process())
    watched = losses_of(engine, watched=WARM_UP + 1)
    assert losses_of(build_engine(config, single_process())) == pytest.approx(watched, rel=BF16)
    assert engine.graph is not None
    reserved = torch.cuda.memory_reserved()
    engine.graph.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved

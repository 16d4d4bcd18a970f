"""Gradients: which parameters are reduced how, and replicas that stay replicas.

Also fp32 sums, the exact norm, and steps that are skipped together.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

from model.depth.schemes import SCHEMES, scheme_names
from model.parameters.shards import WHOLE
from parallel.engine.engine import Engine, EngineOptions
from parallel.engine.gradients import GradientBuffer, Group, Kind
from pretrain.config.schema import RunConfig
from pretrain.tasks.task import Batch
from tests import distributed
from tests.distributed import gather, launch, rebuild
from tests.parallel.training import (
    DROPOUT,
    batches_of,
    engine_of,
    forward_step,
    given,
    run_config,
    train,
    whole_parameters,
)
from tests.rows import local_parameter

SP = given(tensor=2, sequence_parallel=True)
NORM = re.compile(r"(^embedding\.norm|_layernorm|(?<!\.input)_norm)\.(weight|bias)$|\.gpas\.gate$")
ROW_BIAS = re.compile(r"(linear_proj|linear_fc2)\.bias$")


def kinds(engine: Engine) -> dict[str, str]:
    """Kind of every parameter of this rank by name."""
    return {named.name: group.kind.value for group in engine.groups for named in group.parameters}


def replicas_over_steps(
    model: dict[str, Any], parallel: dict[str, Any], steps: int, *, reduce: bool = True
) -> str:
    """Trains and compares, after every step, all parameters that the two ranks hold whole.

    Returns the first that differs, with its step, or nothing.
    """
    config = run_config(model | DROPOUT, parallel)
    engine = engine_of(config)
    if not reduce:
        for buffer in engine.buffers:
            if buffer.group.kind is Kind.SEQUENCE:
                buffer.group = dataclasses.replace(buffer.group, kind=Kind.REPLICATED)
    replicated = [
        named for group in engine.groups if group.kind is not Kind.SHARDED for named in group.parameters
    ]
    assert {named.shard for named in replicated} == {WHOLE}
    found = ""

    def compare(step: int) -> None:
        nonlocal found
        first, second = gather(torch.cat([named.parameter.detach().flatten() for named in replicated]))
        if not found and not torch.equal(first, second):
            found = f"step {step}"

    train(config, engine, 0, steps, compare)
    return found


def two_ranks() -> dict[str, Any]:
    """Runs inside two ranks."""
    found: dict[str, Any] = {"sequence": {}, "tensor": {}}
    for scheme in scheme_names():
        found["sequence"][scheme] = kinds(engine_of(run_config(given(scheme=scheme), SP)))
    llama = given(
        scheme="peri_ln", normalization="rmsnorm", bias=False, position="rotary", tie_embeddings=False
    )
    found["rmsnorm"] = kinds(engine_of(run_config(llama, SP)))
    found["tensor"] = kinds(engine_of(run_config(given(scheme="peri_ln"), given(tensor=2))))
    found["pipeline"] = gather(kinds(engine_of(run_config({}, given(pipeline=2)))))
    found["replicas"] = replicas_over_steps(given(scheme="peri_ln"), SP, 12)
    found["replicas_tensor"] = replicas_over_steps(given(scheme="deepscalelm_post_ln"), given(tensor=2), 12)
    found["replicas_unreduced"] = replicas_over_steps(given(scheme="peri_ln"), SP, 3, reduce=False)
    found["skipped"] = skipped_together()
    return found


def skipped_together() -> dict[str, Any]:
    """A value that is not finite on rank 1 only."""
    config = run_config()
    engine = engine_of(config)
    before, _ = whole_parameters(engine)

    def poisoned(iterator: Any, chunk: nn.Module) -> Any:
        output, loss_of = forward_step(iterator, chunk)
        return output, lambda losses: loss_of(
            losses * (float("nan") if torch.distributed.get_rank() == 1 else 1.0)
        )

    batches = batches_of(config, engine, 0)
    result = engine.train_step(poisoned, lambda: iter(batches), len(batches))
    after, _ = whole_parameters(engine)
    unchanged = all(after[name].equal(before[name]) for name in before)
    recovered = train(config, engine, 0, 1)
    return {"applied": gather(result.applied), "unchanged": unchanged, "loss": recovered.losses[0]}


def whole_gradients(engine: Engine) -> list[torch.Tensor]:
    """The flat fp32 buffers, one a group."""
    return [buffer.flat for buffer in engine.buffers if isinstance(buffer, GradientBuffer)]


def one_rank() -> dict[str, Any]:
    """Runs inside one rank."""
    config = run_config(train=given(precision="bf16"))
    engine = engine_of(config)
    found: dict[str, Any] = sums_of_micro_batches(engine, batches_of(config, engine, 0))
    found["no_grad_left"] = all(named.parameter.grad is None for named in engine.parameters)
    found["dtypes"] = {str(flat.dtype) for flat in whole_gradients(engine)}
    found["norm"] = error_of_a_large_norm(engine)

    clipped = run_config(clip_grad=0.1)
    engine = engine_of(clipped)
    norm = train(clipped, engine, 0, 1).norms[0]
    after = sum(float(flat.double().square().sum()) for flat in whole_gradients(engine)) ** 0.5
    found["clip"] = (norm, after)
    found["decay"] = {(group.decay, named.name) for group in engine.groups for named in group.parameters}
    found["decay_embeddings"] = decayed_with_embeddings(engine, clipped)
    try:
        engine_of(run_config(parallel=given(zero=0), train=given(precision="bf16")))
    except ValueError as error:
        found["refused"] = str(error)
    return found


def gradients_of(engine: Engine, chosen: list[Batch]) -> list[torch.Tensor]:
    """The flat buffers after a step over these micro-batches, which leaves the weights alone."""
    flats: list[torch.Tensor] = []
    weights = [named.parameter.detach().clone() for named in engine.parameters]
    engine.set_lr(0.0)
    engine.train_step(
        forward_step,
        lambda: iter(chosen),
        len(chosen),
        inspect=lambda: flats.extend(flat.clone() for flat in whole_gradients(engine)),
    )
    assert all(
        torch.equal(named.parameter, weight) for named, weight in zip(engine.parameters, weights, strict=True)
    )
    return flats


def sums_of_micro_batches(engine: Engine, batches: list[Batch]) -> dict[str, Any]:
    """Whether a step's gradients are the sum of its micro-batches' in fp32, and whether in bf16."""
    together = gradients_of(engine, batches)
    single = [gradients_of(engine, [batch]) for batch in batches]
    scaled = [[flat / len(batches) for flat in flats] for flats in single]
    exact, rounded = (
        [torch.zeros_like(flat) for flat in together],
        [torch.zeros_like(flat).bfloat16() for flat in together],
    )
    for flats in scaled:
        for total, coarse, flat in zip(exact, rounded, flats, strict=True):
            total.add_(flat)
            coarse.add_(flat.bfloat16())
    return {
        "fp32_sum": all(map(torch.equal, together, exact)),
        "bf16_sum": all(
            torch.equal(flat, coarse.float()) for flat, coarse in zip(together, rounded, strict=True)
        ),
    }


def error_of_a_large_norm(engine: Engine) -> float:
    """Relative error of the squared norm of 5 million elements."""
    big = nn.Parameter(torch.empty(5_000_001))
    group = Group(Kind.REPLICATED, True, [local_parameter("big", big)])
    buffer = GradientBuffer(group, [0], big.numel(), engine.topology, sharded=False)
    buffer.flat.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))
    return float(buffer.squared_norm()) / float(buffer.flat.double().square().sum()) - 1


def decayed_with_embeddings(engine: Engine, config: RunConfig) -> set[str]:
    """Names of the parameters that are decayed where embeddings are."""
    engine = Engine(
        engine.chunks,
        rebuild(config.parallel, config.model),
        make_optimizer=lambda groups: torch.optim.AdamW([{"params": group["params"]} for group in groups]),
        options=EngineOptions(
            dtype=torch.float32,
            micro_batch_size=2,
            seq_length=16,
            clip=1.0,
            tied=True,
            decay_embeddings=True,
        ),
    )
    return {named.name for group in engine.groups for named in group.parameters if group.decay}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    one, two = launch(distributed.Group(1, one_rank), distributed.Group(2, two_ranks))
    return one[0] | two[0]


@pytest.mark.parametrize("scheme", scheme_names())
def test_sequence_parallel_sums_exactly_norms_and_row_biases(found: dict[str, Any], scheme: str) -> None:
    given_kinds = found["sequence"][scheme]
    expected = {name for name in given_kinds if NORM.search(name) or ROW_BIAS.search(name)}
    assert {name for name, kind in given_kinds.items() if kind == "sequence"} == expected
    # The position table is added before the stream is cut along the sequence.
    # Its gradient is whole on every rank.
    assert {name for name, kind in given_kinds.items() if kind == "replicated"} == {
        "embedding.position_embeddings.weight"
    }
    plan = SCHEMES[scheme].plan(4)
    norms = sum(
        part.norm_in + part.norm_branch + part.norm_out + len(part.inner)
        for layer in plan
        for part in (layer.attention, layer.mlp)
    )
    norms += SCHEMES[scheme].embedding_norm + SCHEMES[scheme].final_norm
    gates = sum(layer.gate for layer in plan)
    assert len(expected) == 2 * norms + 2 * len(plan) + gates


def test_kinds_without_biases_and_without_sequence_parallelism(found: dict[str, Any]) -> None:
    assert {name for name, kind in found["rmsnorm"].items() if kind == "sequence"} == {
        name for name in found["rmsnorm"] if NORM.search(name)
    }
    assert "replicated" not in found["rmsnorm"].values()
    expected = {
        name for name in found["tensor"] if NORM.search(name) or ROW_BIAS.search(name) or "position" in name
    }
    assert {name for name, kind in found["tensor"].items() if kind == "replicated"} == expected
    assert set(found["tensor"].values()) == {"replicated", "sharded"}


def test_tied_embedding_has_two_places_under_a_pipeline(found: dict[str, Any]) -> None:
    first, last = found["pipeline"]
    assert [name for name, kind in first.items() if kind == "tied"] == ["embedding.word_embeddings.weight"]
    assert [name for name, kind in last.items() if kind == "tied"] == ["embedding.word_embeddings.weight"]


def test_replicas_are_identical_after_every_step(found: dict[str, Any]) -> None:
    assert not found["replicas"]
    assert not found["replicas_tensor"]


def test_replicas_part_without_the_reduction(found: dict[str, Any]) -> None:
    assert found["replicas_unreduced"] == "step 0"


def test_a_value_that_is_not_finite_skips_the_step_on_all_ranks(found: dict[str, Any]) -> None:
    assert found["skipped"]["applied"] == [False, False]
    assert found["skipped"]["unchanged"]
    assert found["skipped"]["loss"] > 0


def test_bf16_gradients_are_summed_in_fp32(found: dict[str, Any]) -> None:
    assert found["fp32_sum"]
    assert not found["bf16_sum"], "the check above would not notice a sum in bf16"
    assert found["no_grad_left"]
    assert found["dtypes"] == {"torch.float32"}


def test_norm_of_many_elements_is_exact(found: dict[str, Any]) -> None:
    assert abs(found["norm"]) < 1e-8


def test_clipping_scales_to_the_limit(found: dict[str, Any]) -> None:
    norm, after = found["clip"]
    assert norm > 0.2
    assert after == pytest.approx(0.1, rel=1e-4)


def test_what_decays(found: dict[str, Any]) -> None:
    decayed = {name for decay, name in found["decay"] if decay}
    assert decayed == {name for _, name in found["decay"] if name.endswith(".weight") and ".linear_" in name}
    assert found["decay_embeddings"] - decayed == {
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
    }


def test_half_precision_without_master_weights_is_refused(found: dict[str, Any]) -> None:
    assert (
        found["refused"]
        == "parallel.zero=0 keeps no fp32 copy of bf16 weights: use parallel.zero=1, or train.precision=fp32"
    )

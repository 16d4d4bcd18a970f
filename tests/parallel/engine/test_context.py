"""What a cut sequence changes beside the curve: fp64, dropout, evaluation, memory. Slow."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.cost.activations import Activations
from pretrain.tasks.causal_lm import CAUSAL_LM
from pretrain.train.build import build_chunks
from pretrain.train.steps import evaluation_step, own_tokens
from tests.distributed import Group, launch, rebuild
from tests.model.cost.saved import saved_bytes
from tests.parallel.context_layouts import CAPPED
from tests.parallel.engine.test_dropout import FULL, SELECTIVE, STEPS, same, streams
from tests.parallel.layouts import LLAMA, LOCAL
from tests.parallel.training import (
    DROPOUT,
    SEQ_LENGTH,
    VOCAB_SIZE,
    batches_of,
    engine_of,
    given,
    run,
    run_config,
    train,
)

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "one group, no positions": given(position="none", num_query_groups=1),
    "GQA rotary": LLAMA,
    "windows": LOCAL,
    "windows everywhere": LLAMA | given(window=3),
    "soft caps": CAPPED,
    "soft caps in windows": CAPPED | given(window=5),
}
SAVED: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "one group, no positions": given(position="none", num_query_groups=1),
    "GQA rotary": LLAMA,
    "norms of queries and keys": LLAMA | given(attention=given(qk_norm=True)),
    "soft caps": given(attention=given(soft_cap=2.0), num_query_groups=2),
    "soft caps, rotary": LLAMA | given(attention=given(soft_cap=2.0)),
}
AGAIN = {"selective": SELECTIVE, "full": FULL}
WORLDS = (2, 4)


def exact(model: dict[str, Any], context: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients of two samples in fp64, the same on all ranks."""
    config = run_config(model, given(context=context))
    topology = rebuild(config.parallel, config.model)
    (chunk,) = build_chunks(config.model, topology, seq_length=SEQ_LENGTH, dtype=torch.float64, seed=1)
    tokens = torch.randint(0, VOCAB_SIZE, (2, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = own_tokens({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}, topology)
    loss = chunk(batch).mean()
    loss.backward()
    found = {name: one.grad for name, one in chunk.named_parameters() if one.grad is not None}
    total = loss.detach().clone()
    for value in (total, *found.values()):
        dist.all_reduce(value)
        value.div_(dist.get_world_size())
    return float(total), found


def exact_of_all(context: int) -> dict[str, Any]:
    return {name: exact(model, context) for name, model in MODELS.items()}


def evaluated(context: int) -> tuple[float, ...]:
    """Sums of an evaluation after two steps."""
    config = run_config(LLAMA, given(context=context))
    engine = engine_of(config)
    train(config, engine, 0, 2)
    batches = batches_of(config, engine, 3)
    return engine.evaluate(
        evaluation_step(CAUSAL_LM), functools.partial(iter, batches), len(batches), CAUSAL_LM.sums
    )


def saved(model: dict[str, Any], recompute: dict[str, Any]) -> tuple[float, float]:
    """(Bytes that autograd keeps, what the formula says) on two ranks."""
    config = run_config(model, given(context=2) | recompute)
    topology = rebuild(config.parallel, config.model)
    (chunk,) = build_chunks(
        config.model,
        topology,
        seq_length=SEQ_LENGTH,
        dtype=torch.float32,
        seed=1,
        **config.parallel.recompute.core_fields(),
    )
    tokens = torch.randint(0, VOCAB_SIZE, (3, SEQ_LENGTH + 1))
    batch = own_tokens({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}, topology)
    granularity = config.parallel.recompute.granularity
    expected = Activations(config.model, 3, SEQ_LENGTH, recompute=granularity, context=2).whole()
    if config.model.position == "rotary":
        expected += 2 * 4 * SEQ_LENGTH / 2 * config.model.rotary_width  # one table for all layers
    return saved_bytes(chunk.train(), lambda: chunk(batch).mean()), expected


def two_ranks() -> dict[str, Any]:
    """Runs inside two ranks."""
    config = run_config(DROPOUT, given(context=2))
    first = run(config, STEPS)
    return {
        "exact": exact_of_all(2),
        "evaluated": evaluated(2),
        "saved": {name: saved(model, {}) for name, model in SAVED.items()},
        "saved again": {name: saved(LLAMA, how) for name, how in AGAIN.items()},
        "repeated": same(first, run(config, STEPS)) and not first.unequal,
        "again": {
            name: same(first, run(run_config(DROPOUT, given(context=2) | how), STEPS))
            for name, how in AGAIN.items()
        },
        "streams": streams(given(context=2)),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    one, evaluation, two, four = launch(
        Group(1, exact_of_all, (1,)),
        Group(1, evaluated, (1,)),
        Group(2, two_ranks),
        Group(4, exact_of_all, (4,)),
    )
    return two[0] | {
        "one": one[0],
        "evaluated by one": evaluation[0],
        "exact of": {2: two[0]["exact"], 4: four[0]},
    }


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_one_process_in_fp64(
    found: dict[str, Any], name: str, world: int
) -> None:
    loss, gradients = found["exact of"][world][name]
    expected, reference = found["one"][name]
    assert loss == pytest.approx(expected, rel=1e-13)
    assert gradients.keys() == reference.keys()
    for parameter, value in reference.items():
        torch.testing.assert_close(gradients[parameter], value, rtol=1e-10, atol=1e-13, msg=parameter)


def test_an_evaluation_sums_every_label_once(found: dict[str, Any]) -> None:
    total, labels = found["evaluated"]
    assert total == pytest.approx(found["evaluated by one"][0], rel=1e-6)
    assert labels == found["evaluated by one"][1] == 8 * SEQ_LENGTH


@pytest.mark.parametrize("name", SAVED)
def test_formula_counts_every_saved_byte(found: dict[str, Any], name: str) -> None:
    measured, expected = found["saved"][name]
    assert measured == expected


@pytest.mark.parametrize("name", AGAIN)
def test_formula_counts_what_recomputation_keeps(found: dict[str, Any], name: str) -> None:
    measured, expected = found["saved again"][name]
    assert expected <= measured <= 1.03 * expected


def test_dropout_repeats_and_recomputes(found: dict[str, Any]) -> None:
    assert found["repeated"]
    assert found["again"] == dict.fromkeys(AGAIN, True)


def test_ranks_draw_masks_of_their_own(found: dict[str, Any]) -> None:
    first, second = found["streams"]
    assert first[0] != second[0]
    assert first[1] != second[1]

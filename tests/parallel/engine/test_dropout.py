"""Dropout draws from the right stream on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import Group, gather, launch
from tests.parallel.training import (
    DROPOUT,
    SEQ2SEQ,
    Curve,
    batches_of,
    engine_of,
    forward_step,
    given,
    run,
    run_config,
    train,
)

STEPS = 2  # the second shows that the streams went on in the same way
HIDDEN = given(hidden_dropout=0.1)
TP, SP, PP = given(tensor=2), given(tensor=2, sequence_parallel=True), given(pipeline=2)
LAYOUTS = {
    "TP2": TP,
    "TP2 + SP": SP,
    "PP2": PP,
    "PP2 interleaved": PP | given(virtual_stages=2),
    "DP2": given(),
}
FULL = {"recompute": given(granularity="full")}
SELECTIVE = {"recompute": given(granularity="selective")}
# Attention alone is computed again in one way for all.
# With sequence parallelism its masks and those of the rest come from different streams.
RECOMPUTE = dict.fromkeys(LAYOUTS, (FULL,)) | {"TP2 + SP": (FULL, SELECTIVE)}
# Encoder-decoders, of which two streams have to draw.
CROSSED = {"TP2 + SP": FULL, "TP2": SELECTIVE, "PP2 interleaved": FULL, "DP2": SELECTIVE}


def same(ours: Curve, theirs: Curve) -> bool:
    return ours.losses == theirs.losses and all(
        value.equal(theirs.parameters[name]) for name, value in ours.parameters.items()
    )


def losses_on_every_rank(parallel: dict[str, Any], model: dict[str, Any]) -> list[list[float]]:
    """Micro-batch losses as each rank sees them, all ranks given the same tokens."""
    config = run_config(model, parallel)
    engine = engine_of(config)
    seen: list[float] = []

    def recording(iterator: Any, chunk: nn.Module) -> Any:
        output, loss_of = forward_step(iterator, chunk)

        def record(losses: torch.Tensor) -> Any:
            loss, detached = loss_of(losses)
            seen.append(float(detached))
            return loss, detached

        return output, record

    batches = [
        {name: part.clone() for name, part in batch.items()} for batch in batches_of(config, engine, 0)
    ]
    for part in (part for batch in batches for part in batch.values()):
        torch.distributed.broadcast(part, src=0)
    engine.train_step(recording, lambda: iter(batches), len(batches))
    return gather(seen)


def streams(parallel: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """Each rank's default and model-parallel random state after a step."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    config = run_config(DROPOUT, parallel)
    train(config, engine_of(config), 0, 1)
    return gather(
        (
            torch.get_rng_state().numpy().tobytes(),
            get_cuda_rng_tracker().get_states()["model-parallel-rng"].numpy().tobytes(),
        )
    )


def two_ranks() -> dict[str, Any]:
    """Runs inside two ranks."""
    found: dict[str, Any] = {"repeatable": {}, "recompute": {}, "hidden": {}}
    for name, layout in LAYOUTS.items():
        first = run(run_config(DROPOUT, layout), STEPS)
        found["repeatable"][name] = same(first, run(run_config(DROPOUT, layout), STEPS)) and not first.unequal
        found["recompute"][name] = [
            same(first, run(run_config(DROPOUT, layout | how), STEPS)) for how in RECOMPUTE[name]
        ]
    found["crossed"] = {}
    for name, how in CROSSED.items():
        first = run(run_config(SEQ2SEQ | DROPOUT, LAYOUTS[name]), STEPS)
        again = run(run_config(SEQ2SEQ | DROPOUT, LAYOUTS[name] | how), STEPS)
        found["crossed"][name] = same(first, again) and not first.unequal
    found["crossed_hidden"] = run(run_config(SEQ2SEQ | HIDDEN, TP), STEPS).losses
    found["hidden"] = run(run_config(HIDDEN, TP), STEPS).losses
    found["other_seed"] = [run(run_config(DROPOUT, TP, given(seed=seed)), STEPS).losses for seed in (1, 2)]
    found["tensor"] = losses_on_every_rank(TP, DROPOUT)
    found["sequence"] = losses_on_every_rank(SP, DROPOUT)
    found["data"] = losses_on_every_rank({}, DROPOUT)
    found["data_without"] = losses_on_every_rank({}, {})
    found["streams"] = {name: streams(layout) for name, layout in LAYOUTS.items()}
    return found


def one_rank() -> dict[str, Any]:
    """Runs inside one rank."""
    return {
        "one_hidden": run(run_config(HIDDEN), STEPS).losses,
        "one_without": run(run_config(), STEPS).losses,
        "crossed_one_hidden": run(run_config(SEQ2SEQ | HIDDEN), STEPS).losses,
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    one, two = launch(Group(1, one_rank), Group(2, two_ranks))
    return one[0] | two[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_seed_same_training(found: dict[str, Any], layout: str) -> None:
    assert found["repeatable"][layout]


def test_another_seed_is_another_training(found: dict[str, Any]) -> None:
    first, second = found["other_seed"]
    assert first != second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recompute_draws_the_same_masks_again(found: dict[str, Any], layout: str) -> None:
    assert found["recompute"][layout] == [True] * len(RECOMPUTE[layout])


@pytest.mark.parametrize("layout", CROSSED)
def test_recompute_of_two_stacks_draws_the_same_masks_again(found: dict[str, Any], layout: str) -> None:
    assert found["crossed"][layout]


def test_hidden_masks_of_tensor_parallel_ranks_are_those_of_one_process(found: dict[str, Any]) -> None:
    assert found["hidden"] == pytest.approx(found["one_hidden"], rel=1e-6)
    assert found["hidden"] != pytest.approx(found["one_without"], rel=1e-4)
    assert found["crossed_hidden"] == pytest.approx(found["crossed_one_hidden"], rel=1e-6)


@pytest.mark.parametrize("layout", ["tensor", "sequence"])
def test_tensor_parallel_ranks_see_one_loss(found: dict[str, Any], layout: str) -> None:
    first, second = found[layout]
    assert len(first) == 4
    assert first == second


def test_data_parallel_ranks_draw_other_masks(found: dict[str, Any]) -> None:
    first, second = found["data_without"]
    assert first == second
    first, second = found["data"]
    assert all(abs(a - b) > 1e-4 for a, b in zip(first, second, strict=True))


def test_streams_of_ranks(found: dict[str, Any]) -> None:
    replicated = {name: first[0] == second[0] for name, (first, second) in found["streams"].items()}
    assert replicated == {"TP2": True, "TP2 + SP": True, "PP2": False, "PP2 interleaved": False, "DP2": False}
    # Attention heads and sequence shards are different things on different ranks.
    # So their masks must differ everywhere.
    assert not any(first[1] == second[1] for first, second in found["streams"].values())

"""A resumed training is the training that was not interrupted, bit for bit, dropout included."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.schema import RunConfig
from tests.distributed import Group, gather, launch
from tests.parallel.checkpoint.states import bring, equal, keep, state
from tests.parallel.training import engine_of, given, run_config, train

DROPOUT = given(hidden_dropout=0.1, attention_dropout=0.1)
SP, VP = given(tensor=2, sequence_parallel=True), given(pipeline=2, virtual_stages=2)
BF16 = given(precision="bf16")
ONE: dict[str, RunConfig] = {
    "1 process": run_config(DROPOUT),
    "1 process, bf16": run_config(DROPOUT, {}, BF16),
}
TWO: dict[str, RunConfig] = {
    **{f"DP2, ZeRO-{stage}": run_config(DROPOUT, given(zero=stage)) for stage in (0, 1, 2)},
    "DP2, ZeRO-2, bf16": run_config(DROPOUT, given(zero=2), BF16),
    "DP2, ZeRO-3, bf16": run_config(DROPOUT, given(zero=3), BF16),
    "DP2, offload, bf16": run_config(DROPOUT, given(offload=given(optimizer=True)), BF16),
    "DP2, Muon": run_config(DROPOUT, kind="muon"),
    "TP2 + SP, bf16": run_config(DROPOUT, SP, BF16),
    "TP2, full recompute": run_config(DROPOUT, given(tensor=2, recompute=given(granularity="full"))),
    "PP2": run_config(DROPOUT, given(pipeline=2)),
    "PP2 interleaved, untied": run_config(DROPOUT | given(tie_embeddings=False), VP),
}


# Layouts that are also compared with a training which wrote no checkpoint.
UNDISTURBED = ("1 process", "1 process, bf16", "DP2, ZeRO-1", "DP2, ZeRO-3, bf16", "TP2 + SP, bf16")
FACTS = ("streams", "loaded", "losses", "norms", "state")


def resumed(config: RunConfig, undisturbed: bool) -> dict[str, bool]:
    """Runs inside ranks: six steps with a checkpoint after three.

    From there three steps in a new engine with other weights and streams.
    undisturbed: also compares with six steps without a checkpoint.
    """
    folder = Path(gather(tempfile.mkdtemp(prefix="fathom-resume-"))[0])
    engine = engine_of(config)
    first = train(config, engine, 0, 3)
    keep(engine, config, folder, 3)
    saved = state(engine)
    second = train(config, engine, 3, 6)
    expected = state(engine)
    other = config.model_copy(deep=True)
    other.train.seed = 999
    engine = engine_of(other)
    streams = bring(engine, folder)
    loaded = equal(state(engine), saved)
    again = train(config, engine, 3, 6)
    facts = {
        "streams": streams,
        "loaded": loaded,
        "losses": again.losses == second.losses,
        "norms": again.norms == second.norms,
        "state": equal(state(engine), expected),
    }
    if undisturbed:
        engine = engine_of(config)
        whole = train(config, engine, 0, 6)
        facts["undisturbed"] = (
            whole.losses == first.losses + second.losses
            and whole.norms == first.norms + second.norms
            and equal(state(engine), expected)
        )
    return {name: all(values) for name, values in ((name, gather(value)) for name, value in facts.items())}


def all_resumed(configs: dict[str, RunConfig]) -> dict[str, dict[str, bool]]:
    return {name: resumed(config, name in UNDISTURBED) for name, config in configs.items()}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    one, two = launch(Group(1, all_resumed, (ONE,)), Group(2, all_resumed, (TWO,)))
    return one[0] | two[0]


@pytest.mark.parametrize("layout", [*ONE, *TWO])
def test_three_and_three_steps_are_six(found: dict[str, Any], layout: str) -> None:
    assert found[layout] == dict.fromkeys((*FACTS, "undisturbed") if layout in UNDISTURBED else FACTS, True)

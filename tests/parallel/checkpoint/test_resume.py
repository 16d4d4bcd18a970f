"""A resumed training is the training that was not interrupted, bit for bit, dropout included."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig
from tests.distributed import Group, gather, launch, shared
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


def resumed(config: RunConfig) -> dict[str, bool]:
    """Runs inside ranks: six steps at once, and three, a checkpoint, three in a new engine with other weights and streams."""
    folder = Path(gather(tempfile.mkdtemp(prefix="fathom-resume-"))[0])
    engine = engine_of(config)
    whole = train(config, engine, 0, 6)
    expected = state(engine)
    engine = engine_of(config)
    first = train(config, engine, 0, 3)
    keep(engine, config, folder, 3)
    saved = state(engine)
    other = config.model_copy(deep=True)
    other.train.seed = 999
    engine = engine_of(other)
    streams = bring(engine, folder)
    loaded = equal(state(engine), saved)
    second = train(config, engine, 3, 6)
    facts = {
        "streams": streams,
        "loaded": loaded,
        "losses": first.losses + second.losses == whole.losses,
        "norms": first.norms + second.norms == whole.norms,
        "state": equal(state(engine), expected),
    }
    return {name: all(values) for name, values in ((name, gather(value)) for name, value in facts.items())}


def all_resumed(configs: list[RunConfig]) -> list[dict[str, bool]]:
    return [resumed(config) for config in configs]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def compute() -> dict[str, Any]:
        one, two = launch(Group(1, all_resumed, (list(ONE.values()),)), Group(2, all_resumed, (list(TWO.values()),)), timeout=400)
        return dict(zip(ONE, one[0], strict=True)) | dict(zip(TWO, two[0], strict=True))

    return shared(tmp_path_factory.getbasetemp(), "resume", compute)


@pytest.mark.parametrize("layout", [*ONE, *TWO])
def test_three_and_three_steps_are_six(found: dict[str, Any], layout: str) -> None:
    assert found[layout] == {"streams": True, "loaded": True, "losses": True, "norms": True, "state": True}

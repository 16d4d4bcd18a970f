"""A resumed training is the training that was not interrupted, bit for bit, dropout included.

Under every optimizer, which keeps what the table says and what `fathom plan` counts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest

from model.cost.activations import Activations
from parallel.engine.engine import Engine
from parallel.optimizers import OPTIMIZERS, OptimizerName
from pretrain.config.schema import RunConfig
from pretrain.plan.memory import rank_memory, stages
from pretrain.train.build import MAKERS
from tests.distributed import Group, gather, launch
from tests.parallel.checkpoint.states import bring, equal, keep, optimizer_of, state
from tests.parallel.training import DROPOUT, SEQ2SEQ, engine_of, given, run_config, train

SP, VP = given(tensor=2, sequence_parallel=True), given(pipeline=2, virtual_stages=2)
BF16 = given(precision="bf16")
ONE: dict[str, RunConfig] = {
    "1 process": run_config(DROPOUT),
    "1 process, bf16": run_config(DROPOUT, {}, BF16),
    "1 process, compiled": run_config(DROPOUT | given(num_layers=2), {}, given(compile=True)),
}
TWO: dict[str, RunConfig] = {
    **{
        f"DP2, ZeRO-{stage}, {kind}": run_config(DROPOUT, given(zero=stage), kind=kind)
        for kind, optimizer in OPTIMIZERS.items()
        for stage in (0, 1, 2)
        if stage not in optimizer.no_zero
    },
    "DP2, ZeRO-2, bf16": run_config(DROPOUT, given(zero=2), BF16),
    "DP2, ZeRO-3, bf16": run_config(DROPOUT, given(zero=3), BF16),
    "DP2, offload, bf16": run_config(DROPOUT, given(offload=given(optimizer=True)), BF16),
    "TP2, Muon": run_config(DROPOUT, given(tensor=2), kind="muon"),
    "PP2, Muon": run_config(DROPOUT, given(pipeline=2), kind="muon"),
    "TP2 + SP, bf16": run_config(DROPOUT, SP, BF16),
    "TP2, full recompute": run_config(DROPOUT, given(tensor=2, recompute=given(granularity="full"))),
    "CP2, ZeRO-2": run_config(DROPOUT, given(context=2, zero=2)),
    "PP2": run_config(DROPOUT, given(pipeline=2)),
    "PP2 interleaved, untied": run_config(DROPOUT | given(tie_embeddings=False), VP),
    "TP2 + SP, encoder-decoder": run_config(DROPOUT | SEQ2SEQ, SP),
    "PP2 interleaved, encoder-decoder": run_config(DROPOUT | SEQ2SEQ, VP),
    "DP2, ZeRO-3, encoder-decoder": run_config(DROPOUT | SEQ2SEQ, given(zero=3)),
}


# Layouts that are also compared with a training which wrote no checkpoint.
UNDISTURBED = (
    "1 process",
    "1 process, bf16",
    "1 process, compiled",
    "DP2, ZeRO-1, adamw",
    "DP2, ZeRO-3, bf16",
    "TP2 + SP, bf16",
)
FACTS = ("kept", "planned", "streams", "loaded", "losses", "norms", "state")


def is_kept(engine: Engine) -> bool:
    """Whether the optimizer keeps of every parameter what the table says, and nothing else."""
    optimizer = optimizer_of(engine)
    return all(
        sorted(optimizer.state[parameter]) == sorted(("step", *group.update.states))
        for settings, group in zip(optimizer.param_groups, engine.groups, strict=True)
        for parameter in settings["params"]
    )


def is_planned(config: RunConfig, engine: Engine) -> bool:
    """Whether this rank's optimizer state has the size that `fathom plan` predicts, to the byte."""
    topology, train = engine.topology, config.train
    tensors = [
        value
        for kept in optimizer_of(engine).state.values()
        for name, value in kept.items()
        if name != "step"
    ]
    tensors += engine.masters if engine.zero else []
    data = config.data
    model = config.model.model_copy(update={"max_source_positions": data.source_length})
    activations = Activations(
        model, train.micro_batch_size, data.seq_length, 4, source_length=data.source_length
    )
    kind = config.optimizer.kind
    stage = stages(model, topology.layout, 1, kind)[topology.pipeline_rank]
    planned = rank_memory(stage, topology.layout, activations, optimizer=kind).optimizer
    return sum(tensor.nbytes for tensor in tensors) == planned


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
        "kept": is_kept(engine),
        "planned": is_planned(config, engine),
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


def test_every_optimizer_has_a_name_and_is_made() -> None:
    assert get_args(OptimizerName) == tuple(OPTIMIZERS) == tuple(MAKERS)
    updates = {update for one in OPTIMIZERS.values() for update in (one.hidden, one.others)}
    assert len({update.name for update in updates}) == len(updates)  # groups go by it


@pytest.mark.parametrize("layout", [*ONE, *TWO])
def test_three_and_three_steps_are_six(found: dict[str, Any], layout: str) -> None:
    assert found[layout] == dict.fromkeys((*FACTS, "undisturbed") if layout in UNDISTURBED else FACTS, True)

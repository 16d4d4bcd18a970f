"""Batches and sequences that grow: stages by step, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.config.load import load_config
from pretrain.config.sections.growth import BatchRampup, Growth, LengthWarmup, batch_growth, length_growth
from pretrain.train.checks.feasibility import fit_processes
from tests.pretrain.config.minimal import MINIMAL, message


def test_stages_are_equal_and_sums_are_those_of_the_steps() -> None:
    for growth in (
        batch_growth(BatchRampup(start=8, steps=9), 32),
        batch_growth(BatchRampup(start=4, increment=7, steps=10), 32),
        batch_growth(BatchRampup(start=4, increment=4, steps=8), 32),
        length_growth(LengthWarmup(start=2, steps=7), 16),
        Growth((5,)),
    ):
        values = [growth.at(step) for step in range(20)]
        assert values == sorted(values)
        assert set(values) == set(growth.values)
        assert values[growth.steps :] == [growth.last] * (20 - growth.steps)
        assert not growth.steps or values[growth.steps - 1] < growth.last
        assert [growth.before(step) for step in range(21)] == [sum(values[:step]) for step in range(21)]
        lengths = [values.count(value) for value in growth.values[:-1]]
        assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert batch_growth(BatchRampup(start=4, increment=7, steps=10), 32).values == (4, 11, 18, 25, 32)
    assert length_growth(LengthWarmup(start=2, steps=7), 16).values == (2, 4, 8, 16)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["schedule.batch_rampup.start=1"], "start=1 needs schedule.batch_rampup.steps: give it"),
        (["schedule.seq_length_warmup.steps=1"], "steps=1 needs schedule.seq_length_warmup.start: give it"),
        (
            ["schedule.batch_rampup.increment=1"],
            "increment=1 has no effect without schedule.batch_rampup.start",
        ),
        (
            ["schedule.batch_rampup={start: 2, steps: 1}"],
            "start=2 has no effect with train.global_batch_size=2",
        ),
        (
            ["schedule.batch_rampup={start: 1, increment: 2, steps: 1}", "train.global_batch_size=4"],
            "increment=2 does not lead from schedule.batch_rampup.start=1 to train.global_batch_size=4",
        ),
        (
            ["schedule.batch_rampup={start: 1, steps: 2}", "train.global_batch_size=4"],
            "steps=2 are fewer than its 3 stages",
        ),
        (
            ["schedule.seq_length_warmup={start: 3, steps: 3}"],
            "start=3 does not double to data.seq_length=16",
        ),
        (["schedule.seq_length_warmup={start: 16, steps: 3}"], "has no effect with data.seq_length=16"),
        (["schedule.seq_length_warmup={start: 8, steps: 4}"], "steps=4 do not end within train.steps=4"),
        (
            ["schedule.batch_rampup={start: 1, steps: 1}", "train.cuda_graph=true"],
            "train.cuda_graph=true does not combine with schedule.batch_rampup.start=1",
        ),
        (
            ["schedule.seq_length_warmup={start: 8, steps: 1}", "train.compile=true"],
            "train.compile=true does not combine with schedule.seq_length_warmup.start=8",
        ),
        (
            ["schedule.seq_length_warmup={start: 8, steps: 1}", "model.family=bert"],
            "does not combine with train.task=masked_lm",
        ),
    ],
)
def test_what_does_not_come_out_even_is_refused(tmp_path: Path, overrides: list[str], expected: str) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    assert expected in message(tmp_path / "run.yaml", *overrides)


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        (
            ["schedule.batch_rampup={start: 3, increment: 1, steps: 3}", "train.micro_batch_size=2"],
            1,
            "schedule.batch_rampup.increment=1 is not divisible by train.micro_batch_size x data-parallel",
        ),
        (
            [
                "schedule.batch_rampup={start: 1, steps: 3}",
                "train.global_batch_size=2",
                "parallel={pipeline: 2, virtual_stages: 2}",
                "model.num_layers=4",
            ],
            2,
            "change schedule.batch_rampup.start or train.micro_batch_size",
        ),
        (
            [
                "schedule.seq_length_warmup={start: 1, steps: 4}",
                "train.steps=8",
                "parallel={tensor: 2, sequence_parallel: true}",
            ],
            2,
            "schedule.seq_length_warmup.start=1 is not divisible by parallel.tensor=2",
        ),
    ],
)
def test_what_does_not_fit_the_processes_is_refused(
    tmp_path: Path, overrides: list[str], world: int, expected: str
) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    base = ["train.global_batch_size=4", "model.vocab_size=64"]
    config = load_config(tmp_path / "run.yaml", [*base, *overrides])
    with pytest.raises(UserError, match=expected):
        fit_processes(config, world)

"""What is asked of a run before its processes start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.errors import UserError
from parallel.hardware.precision import Machine
from pretrain.config.schema import Corpus
from pretrain.train.checks import feasibility
from pretrain.train.checks.feasibility import (
    check_passes,
    eval_rounds,
    fit_configuration,
    fit_machine,
    fit_processes,
)
from tests.parallel.training import given, run_config

H100 = Machine("NVIDIA H100 80GB HBM3", (9, 0), (13, 0), "2.11.0", "")


def test_a_run_that_fits() -> None:
    layout = fit_processes(run_config(parallel=given(tensor=2, sequence_parallel=True)), 4)
    assert (layout.tensor, layout.data, layout.num_microbatches(8, 2)) == (2, 2, 2)


@pytest.mark.parametrize(
    ("world", "parallel", "train", "message"),
    [
        (3, given(tensor=2), {}, "does not divide 3 processes"),
        (
            3,
            {},
            {},
            "train.global_batch_size=8 is not divisible by .* = 2 x 3 = 6: set train.global_batch_size=6",
        ),
        (8, {}, {}, "set train.global_batch_size=16"),
        (
            2,
            given(pipeline=2, virtual_stages=2),
            given(global_batch_size=6),
            "3 micro-batches per step and rank are not a multiple of parallel.pipeline=2",
        ),
    ],
)
def test_processes_that_do_not_fit(
    world: int, parallel: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit_processes(run_config(parallel=parallel, train=train), world)


def test_a_step_that_repeats_its_data_without_end() -> None:
    """Of two data sets by their weights."""
    config = run_config(train=given(global_batch_size=16_777_216))
    config.data.corpora = [Corpus(path="data/large", weight=3), Corpus(path="data/small", weight=1)]
    blend = SimpleNamespace(weights=[3, 1], samples_per_epoch=[10**9, 27])
    with pytest.raises(UserError) as caught:
        check_passes(config, blend)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "train.global_batch_size=16777216: a step would go 155,345 times over data/small, whose train split "
        "has 27 samples: set 108000 or less, or prepare more data"
    )
    config.train.global_batch_size = 108_000
    check_passes(config, blend)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "parallel", "train", "message"),
    [
        ({}, given(sequence_parallel=True), {}, "has no effect with parallel.tensor=1"),
        ({}, {}, given(micro_batch_size=3), "8 is not divisible by .* = 3 x 1 = 3"),
        ({}, given(overlap_grad_reduce=True, zero=3), {}, "does not combine with parallel.zero=3"),
        ({}, given(grad_reduce="bf16", zero=3), {}, "and parallel.zero=3 has none"),
        ({}, given(zero=0), given(precision="bf16"), "parallel.zero=0 keeps no fp32 copy"),
        (
            {},
            given(zero=0),
            given(precision="auto", fp8=given(recipe="delayed")),
            "parallel.zero=0 keeps no fp32 copy",
        ),
        (
            given(ffn_hidden_size=40),
            {},
            given(precision="auto", fp8=given(recipe="delayed")),
            "40 is not a multiple of 16",
        ),
    ],
)
def test_what_no_machine_can_run(
    model: dict[str, Any], parallel: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit_configuration(run_config(model, parallel, train))


def test_processes_that_are_left_open_may_be_many() -> None:
    layout = fit_configuration(run_config(parallel=given(processes=3, tensor=4, overlap_grad_reduce=True)))
    assert (layout.world, layout.data) == (4, 1)
    fit_configuration(run_config(parallel=given(grad_reduce="bf16")))
    with pytest.raises(UserError, match="grad_reduce=bf16 has no effect with one data-parallel rank"):
        fit_processes(run_config(parallel=given(grad_reduce="bf16")), 1)


@pytest.mark.parametrize(
    ("parallel", "samples", "micro", "rounds"),
    [
        ({}, 64, 8, 4),
        ({}, 65, 8, 5),
        ({}, 1, 8, 1),
        (given(pipeline=2), 17, 1, 17),
        (given(pipeline=2, virtual_stages=2), 17, 1, 18),
        (given(pipeline=2, virtual_stages=2), 1, 4, 2),
    ],
)
def test_rounds_of_an_evaluation(parallel: dict[str, Any], samples: int, micro: int, rounds: int) -> None:
    """Enough for every sample, and as many as an interleaved pipeline can walk."""
    layout = fit_processes(run_config(parallel=parallel, train=given(eval_samples=samples)), 2)
    assert eval_rounds(layout, samples, micro) == rounds
    layout.check_batches(16, rounds)


def test_a_sequence_is_asked_about_before_the_vocabulary_is_known() -> None:
    config = run_config(given(vocab_size=None), given(tensor=2, sequence_parallel=True))
    config.data.seq_length = 15
    with pytest.raises(UserError, match="data.seq_length=15 is not divisible by parallel.tensor=2"):
        fit_processes(config, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without GPUs refuses")
@pytest.mark.parametrize(
    ("parallel", "train", "message"),
    [
        ({}, given(precision="bf16", fp8=given(recipe="delayed")), "train.fp8.recipe=delayed needs a GPU"),
        ({}, given(kernels="te"), "train.kernels=te"),
        (given(zero=0), given(precision="bf16"), "parallel.zero=0 keeps no fp32 copy"),
        ({}, given(cuda_graph=True), "train.cuda_graph=true needs a GPU"),
    ],
)
def test_machines_that_do_not_fit(parallel: dict[str, Any], train: dict[str, Any], message: str) -> None:
    config = run_config(parallel=parallel, train=train)
    with pytest.raises(UserError, match=message):
        fit_machine(config, fit_processes(config, 1))


def test_sizes_that_fp8_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "this_machine", lambda: H100)
    config = run_config(given(ffn_hidden_size=40), train=given(precision="bf16", fp8=given(recipe="delayed")))
    with pytest.raises(
        UserError, match="model.ffn_hidden_size per tensor-parallel rank = 40 is not a multiple of 16"
    ):
        fit_machine(config, fit_processes(config, 1))
    config.model.ffn_hidden_size = 64
    assert fit_machine(config, fit_processes(config, 1)).recipe == "delayed"

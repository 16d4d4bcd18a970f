"""Models of speech under every kind of layout are those of one process: one layout quickly."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from parallel.engine.engine import Engine
from pretrain.config.schema import RunConfig
from pretrain.data.order import micro_batch_indices
from pretrain.tasks.task import Batch
from pretrain.tasks.transcription import TRANSCRIPTION
from pretrain.train.steps import shared
from tests.model.network.test_speech import packed
from tests.parallel.layouts import FULL, SP
from tests.parallel.task_layouts import Layout, assert_same, measured, outcome
from tests.parallel.training import engine_of, given, run_config

STEPS, GLOBAL, MICRO, FILTERS, SOURCE, TARGET = 2, 4, 1, 6, 12, 8
SPEECH = given(
    family="speech",
    num_layers=2,
    encoder_layers=2,
    position="sinusoidal",
    speech=given(filters=FILTERS, channels=16),
    max_position_embeddings=None,
)
MODELS = {
    "folded": SPEECH | given(scheme="deepscalelm_pre_ln"),
    "learned": SPEECH | given(scheme="b2t", position="learned", embedding_norm=True),
}
QUICK: dict[str, Layout] = {
    "TP2 x PP2 + SP": (4, given(tensor=2, pipeline=2, sequence_parallel=True), "folded"),
}
SLOW: dict[str, Layout] = {
    "TP2, full recomputation": (2, given(tensor=2) | FULL, "folded"),
    "TP2 + SP": (2, SP, "learned"),
    "PP2 interleaved, DP2, ZeRO-1": (4, given(pipeline=2, virtual_stages=2, zero=1), "folded"),
    "DP2, ZeRO-3": (2, given(zero=3), "learned"),
}
ROWS = ([[13, 7, 4], [3, 2, 2]], [[21, 18], [4, 4]], [[40], [2]], [[4, 4, 4, 4], [1, 1, 1, 1]])
"""Frames and words of the clips of each row."""


def batches(config: RunConfig, engine: Engine, step: int) -> list[Batch]:
    rank, size = engine.topology.data_rank, engine.topology.layout.data
    found: list[Batch] = []
    for number in range(GLOBAL // (MICRO * size)):
        rows = [ROWS[at % GLOBAL] for at in micro_batch_indices(step, number, rank, size, MICRO, GLOBAL)]
        made = packed([clips for clips, _ in rows], [words for _, words in rows], SOURCE)
        found.append({name: one.float() if one.is_floating_point() else one for name, one in made.items()})
    labels = sum(sum(words) for _, words in ROWS)
    return shared(found, labels, size)


def train(model: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any] | None:
    """Inside ranks: what some steps and an evaluation give, from rank 0."""
    sizes = given(global_batch_size=GLOBAL, micro_batch_size=MICRO)
    config = run_config(model, layout, given(label_smoothing=0.1) | sizes, eps=1e-3)
    config.data.source_length, config.data.seq_length = SOURCE, TARGET
    engine = engine_of(config)
    engine.set_lr(1e-3)
    held_out = batches(config, engine, STEPS)
    found = outcome(engine, TRANSCRIPTION, functools.partial(batches, config, engine), held_out, STEPS)
    return found if torch.distributed.get_rank() == 0 else None


def test_a_layout_trains_and_evaluates_as_one_process() -> None:
    found = measured(train, {"folded": MODELS["folded"]}, QUICK)
    for name, (_, _, model) in QUICK.items():
        assert_same(found[name], found[model])


@pytest.mark.slow
def test_other_layouts_train_and_evaluate_as_one_process() -> None:
    found = measured(train, MODELS, SLOW)
    for name, (_, _, model) in SLOW.items():
        assert_same(found[name], found[model])

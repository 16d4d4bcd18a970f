"""Classification of images under every kind of layout is that of one process.

Mixtures of two images have two weighted labels, and labels are smoothed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from model.network.losses import rank_of_label
from parallel.engine.engine import Engine
from pretrain.config.schema import RunConfig
from pretrain.data.order import micro_batch_indices
from pretrain.tasks.classification import CLASSIFICATION
from pretrain.tasks.task import Batch
from pretrain.train.steps import shared
from tests.distributed import Group, launch
from tests.parallel.layouts import FULL, SP
from tests.parallel.task_layouts import Layout, assert_same, measured, outcome
from tests.parallel.training import CLASSES, VIT, engine_of, given, run_config

STEPS, GLOBAL, MICRO = 3, 8, 2
MODELS = {
    "class token": VIT | given(scheme="deepscalelm_post_ln"),
    "mean": VIT
    | given(
        scheme="b2t",
        logit_bias=False,
        position="sinusoidal",
        image=given(height=8, patch=2, channels=1, pool="mean", zero_head=False),
    ),
}
LAYOUTS: dict[str, Layout] = {
    "TP2 x PP2 + SP": (4, given(tensor=2, pipeline=2, sequence_parallel=True), "class token"),
    "TP2, full recomputation": (2, given(tensor=2) | FULL, "mean"),
    "TP2 + SP": (2, SP, "mean"),
    "PP2 interleaved, DP2, ZeRO-1": (4, given(pipeline=2, virtual_stages=2, zero=1), "class token"),
    "DP2, ZeRO-3": (2, given(zero=3), "class token"),
}


def batches(config: RunConfig, engine: Engine, step: int, *, mixed: bool = True) -> list[Batch]:
    rank, size = engine.topology.data_rank, engine.topology.layout.data
    image = config.model.image
    assert image is not None
    found: list[Batch] = []
    for number in range(GLOBAL // (MICRO * size)):
        rows = []
        for index in micro_batch_indices(step, number, rank, size, MICRO, GLOBAL):
            draw = torch.Generator().manual_seed(index)
            share = torch.rand(1, generator=draw)
            row = {
                "images": torch.randn(image.shape, generator=draw),
                "labels": torch.randint(0, CLASSES, (2,), generator=draw),
                "weights": torch.cat((share, 1 - share)),
            }
            rows.append(row if mixed else {"images": row["images"], "labels": row["labels"][:1]})
        found.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    return shared(found, GLOBAL, size) if mixed else found


def train(model: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any] | None:
    """Inside ranks: what some steps and an evaluation give, from rank 0."""
    # A larger epsilon: gradients that are zero but for rounding, as of keys' biases, move nothing.
    config = run_config(model, layout, given(label_smoothing=0.1), eps=1e-3)
    engine = engine_of(config)
    engine.set_lr(1e-3)
    held_out = batches(config, engine, STEPS, mixed=False)
    found = outcome(engine, CLASSIFICATION, functools.partial(batches, config, engine), held_out, STEPS)
    return found if torch.distributed.get_rank() == 0 else None


def ranks_of_labels() -> list[list[int]]:
    """Inside two ranks: ranks of the labels 0, 3 and 5 of four columns each, all and some of them
    tokens, where logits are equal, and where they rise.
    """
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    equal, rising = torch.zeros(1, 3, 4), torch.arange(4.0).expand(1, 3, 4) + 4 * rank
    labels = torch.tensor([[0, 3, 5]])
    cases = [(equal, 8), (rising, 8), (rising, 6)]
    return [rank_of_label(logits, labels, vocab, group)[0].tolist() for logits, vocab in cases]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return measured(train, MODELS, LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_and_evaluates_as_one_process(name: str, found: dict[str, Any]) -> None:
    ours = found[name]
    assert_same(ours, found[LAYOUTS[name][2]])
    assert 0 < ours["sums"][2] <= ours["sums"][-1] == GLOBAL


def test_ranks_of_labels_are_the_same_on_all_ranks_and_count_no_padding() -> None:
    (ranks,) = launch(Group(2, ranks_of_labels, ()))
    assert ranks == [[[0, 3, 5], [7, 4, 2], [5, 2, 0]]] * 2
